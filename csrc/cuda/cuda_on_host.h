// cuda_on_host.h - compile a CUDA kernel source with a plain C++ compiler and run it on the CPU.
// Under nvcc this header only defines LAUNCH, SHARED and DYN_SHARED.  Under g++/clang++ every CUDA
// thread of a block is a fiber; blocks run one after another.  It is a checker, not a backend:
//   * shared memory is filled with NaN before every block (reads of unwritten cells show up);
//   * CUHOST_ORDER=fwd|rev|<seed> picks which warp, and which lane in it, runs first (races show
//   up);
//   * divergent __syncthreads, shuffles naming absent lanes and deadlocks throw std::runtime_error;
//   * with -fsanitize=address,undefined it finds out-of-bounds and misaligned vector accesses.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define LAUNCH(K, GRID, BLOCK, SMEM, STREAM, ...) K<<<GRID, BLOCK, SMEM, STREAM>>>(__VA_ARGS__)
#define DYN_SHARED(T, NAME)                                        \
  extern __shared__ __align__(16) unsigned char cuhost_dyn_smem[]; \
  T* NAME = reinterpret_cast<T*>(cuhost_dyn_smem)
#define SHARED(T, NAME, ...) __shared__ T NAME __VA_ARGS__
// A 16-byte access; the host build throws where the address does not allow it.
template <class V, class T>
__device__ __forceinline__ V vector_load(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
__device__ __forceinline__ void vector_store(T* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}
#else
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(N) alignas(N)
#define __shared__ static  // works, but is not poisoned: prefer SHARED(float, buf, [8][33]);
#define SHARED(T, NAME, ...) \
  static T NAME __VA_ARGS__; \
  cuhost::fresh(&NAME, sizeof NAME)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define CUHOST_VEC(T, N)                                                          \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                 \
  struct N##3 { T x, y, z; };                                                     \
  struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) N##4 { T x, y, z, w; }; \
  inline N##2 make_##N##2(T a, T b) { return {a, b}; }                            \
  inline N##4 make_##N##4(T a, T b, T c, T d) { return {a, b, c, d}; }
CUHOST_VEC(float, float) CUHOST_VEC(int, int) CUHOST_VEC(double, double) struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

struct __nv_bfloat16 {
  uint16_t x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  uint32_t u = uint32_t(h.x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return {0x7fff};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
  return {__float2bfloat16(v.x), __float2bfloat16(v.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16(a), __float2bfloat16(b)};
}
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
using std::max;
using std::min;

namespace cuhost {
enum State { READY, BARRIER, WARP, DONE };
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(CUHOST_UCONTEXT)
struct Context {
  void* sp;
};  // System V callee-saved registers only: no system call, about 5 ns
__attribute__((naked, noinline)) inline void switch_stack(void**, void*) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp,(%rdi); "
      "movq %rsi,%rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void jump(Context& from, Context& to) { switch_stack(&from.sp, to.sp); }
inline void prepare(Context& c, Context&, char* stack, size_t size, void (*entry)()) {
  void** top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  c.sp = top;
}
#else
struct Context {
  ucontext_t u;
};
inline void jump(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
inline void prepare(Context& c, Context& back, char* stack, size_t size, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = size;
  c.u.uc_link = &back.u;
  makecontext(&c.u, entry, 0);
}
#endif
struct Fiber {
  Context ctx;
  std::unique_ptr<char[]> stack;
  State st = DONE;
  uint3 tid{};
  unsigned rank = 0;
  unsigned mask = 0;
  int site = 0, pred = 0;
};
struct Warp {
  unsigned char post[32][16], snap[32][16];
};
struct Engine {
  std::vector<Fiber> f;
  std::vector<Warp> w;
  std::vector<char> dyn;
  std::vector<unsigned> order;
  std::vector<void*> seen;
  Context main;
  Fiber* cur = nullptr;
  unsigned n = 0;
  int vote_and = 1, vote_or = 0, vote_count = 0;
  dim3 grid, block;
  uint3 bid{};
  std::function<void()> body;
  std::exception_ptr err;
  std::mt19937 rng;
  std::string policy;
  static Engine& get() {
    static Engine e;
    return e;
  }
  static constexpr size_t STACK = 128 * 1024;
  static void entry() {
    Engine& e = get();
    try {
      e.body();
    } catch (...) {
      e.err = std::current_exception();
    }
    e.cur->st = DONE;
    jump(e.cur->ctx, e.main);
  }
  void wait(State s) {
    cur->st = s;
    jump(cur->ctx, main);
  }
  [[noreturn]] void fail(const std::string& why, int site) {
    throw std::runtime_error("cuda_on_host: " + why + " (source line " + std::to_string(site) +
                             ", block " + std::to_string(bid.x) + "," + std::to_string(bid.y) +
                             "," + std::to_string(bid.z) + ")");
  }
  // All lanes named by the mask must stand at the same warp operation.
  bool release_warp(unsigned wi) {
    bool any = false;
    for (unsigned l = 0; l < 32 && wi * 32 + l < n; ++l) {
      Fiber& a = f[wi * 32 + l];
      if (a.st != WARP) continue;
      bool whole = true;
      for (unsigned k = 0; k < 32; ++k)
        if (a.mask >> k & 1) {
          if (wi * 32 + k >= n) {
            whole = false;
            continue;
          }  // blockDim not a multiple of 32
          Fiber& b = f[wi * 32 + k];
          if (b.st == DONE || (b.st == WARP && (b.mask != a.mask || b.site != a.site)))
            fail("warp operation: lane " + std::to_string(k) +
                     " of the mask has exited or is at another operation",
                 a.site);
          whole = whole && b.st == WARP;
        }
      if (!whole) {
        if (wi * 32 + 32 > n) fail("warp operation: mask names lanes beyond blockDim", a.site);
        continue;
      }
      unsigned m = a.mask;
      for (unsigned k = 0; k < 32; ++k)
        if (m >> k & 1) {
          memcpy(w[wi].snap[k], w[wi].post[k], 16);
          f[wi * 32 + k].st = READY;
        }
      any = true;
    }
    return any;
  }
  void run_block() {
    seen.clear();
    std::fill(dyn.begin(), dyn.end(), char(0xff));  // all ones: NaN in every float format
    for (unsigned i = 0; i < n; ++i) {
      Fiber& a = f[i];
      a.st = READY;
      a.rank = i;
      a.tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
      if (!a.stack) a.stack.reset(new char[STACK]);
      prepare(a.ctx, main, a.stack.get(), STACK, &entry);
    }
    const bool rnd = policy != "fwd" && policy != "rev";
    for (;;) {
      bool progress = false;
      if (rnd) std::shuffle(order.begin(), order.end(), rng);
      for (unsigned wi :
           order) {  // one warp runs ahead as far as it can (random policy: a random distance)
        unsigned lanes[32];
        bool released;
        for (unsigned l = 0; l < 32; ++l) lanes[l] = policy == "rev" ? 31 - l : l;
        do {
          if (rnd) std::shuffle(lanes, lanes + 32, rng);
          for (unsigned l : lanes)
            if (unsigned i = wi * 32 + l; i < n && f[i].st == READY) {
              cur = &f[i];
              jump(main, cur->ctx);
              progress = true;
              if (err) std::rethrow_exception(std::exchange(err, nullptr));
            }
          released = release_warp(wi);
          progress |= released;
        } while (released && (!rnd || (rng() & 3)));
      }
      if (progress) continue;
      const Fiber* first = nullptr;
      unsigned done = 0;
      for (auto& a : f) {
        if (a.rank >= n) continue;
        if (a.st == DONE) {
          ++done;
          continue;
        }
        if (a.st == WARP)
          fail("deadlock: warp operation waits for lanes that stand at a barrier", a.site);
        if (!first) first = &a;
        if (a.site != first->site)
          fail("divergent __syncthreads: also reached at line " + std::to_string(first->site),
               a.site);
      }
      if (done == n) return;
      if (done) fail("__syncthreads reached by some threads after others exited", first->site);
      vote_and = 1;
      vote_or = vote_count = 0;
      for (unsigned i = 0; i < n; ++i) {
        vote_and &= f[i].pred != 0;
        vote_or |= f[i].pred != 0;
        vote_count += f[i].pred != 0;
        f[i].st = READY;
      }
    }
  }
};
inline std::mutex& launch_mutex() {
  static std::mutex m;
  return m;
}
template <class F, class... A>
void launch(F kernel, dim3 grid, dim3 block, size_t smem, A... args) {
  std::lock_guard<std::mutex> lock(launch_mutex());
  Engine& e = Engine::get();
  e.grid = grid;
  e.block = block;
  e.n = block.x * block.y * block.z;
  e.body = [=] { kernel(args...); };
  if (e.n == 0 || e.n > 1024 || grid.x == 0 || grid.y > 65535 || grid.z > 65535 || !grid.y ||
      !grid.z)
    throw std::runtime_error("cuda_on_host: invalid launch configuration");
  if (smem > 227 * 1024) throw std::runtime_error("cuda_on_host: too much dynamic shared memory");
  const char* o = getenv("CUHOST_ORDER");
  e.policy = o ? o : "fwd";
  e.rng.seed(unsigned(atoi(e.policy.c_str())));
  e.dyn.assign(smem + 16, 0);
  e.f.clear();
  e.f.resize(e.n);
  e.w.resize((e.n + 31) / 32);
  e.order.resize(e.w.size());
  for (unsigned i = 0; i < e.order.size(); ++i)
    e.order[i] = e.policy == "rev" ? unsigned(e.order.size()) - 1 - i : i;
  for (e.bid.z = 0; e.bid.z < grid.z; ++e.bid.z)
    for (e.bid.y = 0; e.bid.y < grid.y; ++e.bid.y)
      for (e.bid.x = 0; e.bid.x < grid.x; ++e.bid.x) e.run_block();
}
inline void fresh(void* p, size_t bytes) {  // poison a SHARED array once per block
  auto& s = Engine::get().seen;
  if (std::find(s.begin(), s.end(), p) == s.end()) {
    s.push_back(p);
    memset(p, 0xff, bytes);
  }
}
inline void* dyn_smem() {
  auto p = reinterpret_cast<uintptr_t>(Engine::get().dyn.data());
  return reinterpret_cast<void*>((p + 15) & ~uintptr_t(15));
}
inline unsigned lane() { return Engine::get().cur->rank & 31; }
inline Warp& warp() { return Engine::get().w[Engine::get().cur->rank >> 5]; }
template <class T>
void exchange(unsigned mask, T v, int site) {
  static_assert(sizeof(T) <= 16);
  Engine& e = Engine::get();
  if (!(mask >> lane() & 1))
    e.fail("warp operation: the calling lane is not in its own mask", site);
  memcpy(warp().post[lane()], &v, sizeof(T));
  e.cur->mask = mask;
  e.cur->site = site;
  e.wait(WARP);
}
template <class T>
T pick(unsigned mask, unsigned src, int site) {
  if (!(mask >> src & 1))
    Engine::get().fail("shuffle reads lane " + std::to_string(src) + ", which is not in the mask",
                       site);
  T v;
  memcpy(&v, warp().snap[src], sizeof(T));
  return v;
}
inline void barrier(int pred, int site) {
  Engine& e = Engine::get();
  e.cur->pred = pred;
  e.cur->site = site;
  e.wait(BARRIER);
}
}  // namespace cuhost

#define threadIdx (cuhost::Engine::get().cur->tid)
#define blockIdx (cuhost::Engine::get().bid)
#define blockDim (cuhost::Engine::get().block)
#define gridDim (cuhost::Engine::get().grid)
#define warpSize 32
#define CUHOST_SITE int site = __builtin_LINE()
inline void __syncthreads(CUHOST_SITE) { cuhost::barrier(0, site); }
inline int __syncthreads_or(int p, CUHOST_SITE) {
  cuhost::barrier(p, site);
  return cuhost::Engine::get().vote_or;
}
inline int __syncthreads_and(int p, CUHOST_SITE) {
  cuhost::barrier(p, site);
  return cuhost::Engine::get().vote_and;
}
inline int __syncthreads_count(int p, CUHOST_SITE) {
  cuhost::barrier(p, site);
  return cuhost::Engine::get().vote_count;
}
inline void __syncwarp(unsigned m = ~0u, CUHOST_SITE) { cuhost::exchange(m, 0, site); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __shfl_sync(unsigned m, T v, int src, int width = 32, CUHOST_SITE) {
  cuhost::exchange(m, v, site);
  unsigned l = cuhost::lane();
  return cuhost::pick<T>(m, (l & ~(width - 1)) | (src & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, CUHOST_SITE) {
  cuhost::exchange(m, v, site);
  unsigned l = cuhost::lane(), s = l ^ x;
  return cuhost::pick<T>(m, s >= (l & ~(width - 1)) + width ? l : s, site);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32, CUHOST_SITE) {
  cuhost::exchange(m, v, site);
  unsigned l = cuhost::lane();
  return cuhost::pick<T>(m, (l & (width - 1)) + d >= unsigned(width) ? l : l + d, site);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32, CUHOST_SITE) {
  cuhost::exchange(m, v, site);
  unsigned l = cuhost::lane();
  return cuhost::pick<T>(m, (l & (width - 1)) < d ? l : l - d, site);
}
inline unsigned __ballot_sync(unsigned m, int p, CUHOST_SITE) {
  cuhost::exchange(m, p != 0, site);
  unsigned r = 0;
  for (unsigned k = 0; k < 32; ++k)
    if (m >> k & 1) r |= unsigned(cuhost::pick<bool>(m, k, site)) << k;
  return r;
}
inline int __any_sync(unsigned m, int p, CUHOST_SITE) { return __ballot_sync(m, p, site) != 0; }
inline int __all_sync(unsigned m, int p, CUHOST_SITE) { return __ballot_sync(m, p, site) == m; }
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T c, T v) {
  T old = *p;
  if (old == c) *p = v;
  return old;
}
template <class V>
void require_aligned(const void* p, int site) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V))
    cuhost::Engine::get().fail("misaligned vector access", site);
}
template <class V, class T>
V vector_load(const T* p, CUHOST_SITE) {
  require_aligned<V>(p, site);
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
void vector_store(T* p, V v, CUHOST_SITE) {
  require_aligned<V>(p, site);
  memcpy(p, &v, sizeof v);
}
inline int cudaMemset2DAsync(void* p, size_t pitch, int v, size_t width, size_t height,
                             cudaStream_t) {
  if (width > pitch) throw std::runtime_error("cuda_on_host: memset wider than its pitch");
  for (size_t r = 0; r < height; ++r) memset(static_cast<char*>(p) + r * pitch, v, width);
  return 0;
}
#define LAUNCH(K, GRID, BLOCK, SMEM, STREAM, ...) \
  ((void)(STREAM),                                \
   cuhost::launch([](auto... a) { K(a...); }, dim3(GRID), dim3(BLOCK), SMEM, __VA_ARGS__))
#define DYN_SHARED(T, NAME) T* NAME = reinterpret_cast<T*>(cuhost::dyn_smem())
#endif
