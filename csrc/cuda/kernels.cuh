// The memory-bound kernels; g++ compiles them too, through cuda_on_host.h.
//
// All of them move 16 bytes per load and store (4 floats or 8 bfloat16) where pointers and sizes
// allow it and single elements otherwise; sums are float32. Device memory traffic per element:
//
//                                  float32   bfloat16
//   adamw                            28         -     read w, g, m, v; write w, m, v
//   gelu, gated_gelu, head_gate       8         4     read x; write y
//   gelu backward + bias gradient    12         6     read dy, pre; write dpre
//   bias gradient alone               4         2     read dy
//   gated_gelu, head_gate backward   12         6     read dy, x; write dx
//   gated_norm                        8         4     read x; write y   (x again from L1)
//   gated_norm backward              12         6     read dy, x; write dx   (both again from L1)
//
// Column sums: a block adds up its rows and writes one line of partial sums; a second, small kernel
// adds the lines in order. No atomics, so that gradients repeat bit by bit.
#pragma once
#include "cuda_on_host.h"
#include "params.h"

namespace vimnas::cuda {

// ------------------------------------------------------------------- elements, vectors, warp sums
template <class T>
constexpr int kWide = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }

// A bfloat16 is the upper half of a float.
__device__ __forceinline__ void unpack(unsigned pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ unsigned pack(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// v = N elements from p: single ones for N = 1, else by 16 bytes.
template <int N>
__device__ __forceinline__ void load(const float* p, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = *p;
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const float4 f = vector_load<float4>(p + k);
      v[k] = f.x;
      v[k + 1] = f.y;
      v[k + 2] = f.z;
      v[k + 3] = f.w;
    }
  }
}

template <int N>
__device__ __forceinline__ void load(const __nv_bfloat16* p, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_float(*p);
  } else {
    static_assert(N == 8);
    const uint4 u = vector_load<uint4>(p);
    unpack(u.x, v[0], v[1]);
    unpack(u.y, v[2], v[3]);
    unpack(u.z, v[4], v[5]);
    unpack(u.w, v[6], v[7]);
  }
}

template <int N>
__device__ __forceinline__ void store(float* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    *p = v[0];
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      vector_store(p + k, make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]));
    }
  }
}

template <int N>
__device__ __forceinline__ void store(__nv_bfloat16* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    from_float(v[0], *p);
  } else {
    static_assert(N == 8);
    uint4 u;
    u.x = pack(v[0], v[1]);
    u.y = pack(v[2], v[3]);
    u.z = pack(v[4], v[5]);
    u.w = pack(v[6], v[7]);
    vector_store(p, u);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// ------------------------------------------------------------------------------------- AdamW
// Blocks are dealt to the boxes in order; a block takes kVectorsPerBlock consecutive vectors of its
// box, counted row by row.
constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;
constexpr int kVectorsPerBlock = kThreads * kVectorsPerThread;

// The last box whose first block is not beyond `block`.
__device__ __forceinline__ int box_of(const AdamBatch& b, int block) {
  int low = 0, high = b.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (b.box[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int V>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamBatch b) {
  const int block = static_cast<int>(blockIdx.x);
  const AdamBox& box = b.box[box_of(b, block)];
  const unsigned per_row = static_cast<unsigned>(box.cols) / V;
  const long long first =
      static_cast<long long>(block - box.first_block) * kVectorsPerBlock + threadIdx.x;
  long long row = first / per_row;
  unsigned column = static_cast<unsigned>(first - row * per_row);
#pragma unroll 1
  for (int k = 0; k < kVectorsPerThread && row < box.rows; ++k) {
    const long long at = box.offset + row * box.stride + static_cast<long long>(column) * V;
    float w[V], g[V], m[V], v[V];
    load(b.param + at, w);
    load(b.grad + at, g);
    load(b.exp_avg + at, m);
    load(b.exp_avg_sq + at, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      w[j] *= b.decay;
      m[j] += (1.f - b.beta1) * (g[j] - m[j]);
      v[j] = b.beta2 * v[j] + (1.f - b.beta2) * g[j] * g[j];
      w[j] -= box.step_size * m[j] / (sqrtf(v[j]) / box.correction + b.eps);
    }
    store(b.param + at, w);
    store(b.exp_avg + at, m);
    store(b.exp_avg_sq + at, v);
    column += kThreads;
    if (column >= per_row) {
      row += column / per_row;
      column %= per_row;
    }
  }
}

// -------------------------------------------------------------------------------------- GELU
// gelu(x) = x s, s = sigmoid(2 u), u = c (x + a x^3): the tanh form, for tanh u = 2 s - 1.
constexpr float kGeluC = 0.7978845608028654f;
constexpr float kGeluA = 0.044715f;

__device__ __forceinline__ float gelu_gate(float x) {
  return __fdividef(1.f, 1.f + __expf(-2.f * kGeluC * x * (1.f + kGeluA * x * x)));
}

__device__ __forceinline__ float gelu_one(float x) { return x * gelu_gate(x); }

__device__ __forceinline__ float gelu_slope(float x) {
  const float s = gelu_gate(x);
  return s + s * (1.f - s) * x * (2.f * kGeluC * (1.f + 3.f * kGeluA * x * x));
}

// A flat array; what does not fill a vector at its end goes element by element.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gelu_kernel(const T* __restrict__ x, T* __restrict__ y, long long count) {
  const long long at = (static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at + V <= count) {
    float v[V];
    load(x + at, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = gelu_one(v[j]);
    store(y + at, v);
  } else {
    for (long long c = at; c < count; ++c) from_float(gelu_one(to_float(x[c])), y[c]);
  }
}

// ------------------------------------------------------- column kernels: gates and their backward
// A block is 32 vectors of columns wide and 8 rows high and walks down its rows, so that a thread
// keeps the masses of its columns in registers.
constexpr int kLanes = 32;
constexpr int kRowsHigh = 8;

struct GatedGelu {
  static __device__ __forceinline__ float apply(float x, float mass) { return gelu_one(x) * mass; }
};
struct HeadGate {
  static __device__ __forceinline__ float apply(float x, float mass) { return x * mass; }
};

// Masses of V columns from `column` on; the mass of a head serves head_dim columns.
template <int V>
__device__ __forceinline__ void load_mass(const float* mass, int column, int head_dim,
                                          float (&m)[V]) {
  if (head_dim == 1) {
#pragma unroll
    for (int j = 0; j < V; ++j) m[j] = mass[column + j];
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) m[j] = mass[(column + j) / head_dim];
  }
}

template <class Op, class T, int V>
__global__ void __launch_bounds__(kLanes* kRowsHigh)
    gate_kernel(const T* __restrict__ x, const float* __restrict__ mass, T* __restrict__ y,
                long long rows, int cols, int head_dim) {
  const int column = static_cast<int>(blockIdx.x * kLanes + threadIdx.x) * V;
  if (column >= cols) return;
  float m[V];
  load_mass(mass, column, head_dim, m);
  const long long step = static_cast<long long>(gridDim.y) * kRowsHigh;
#pragma unroll 2
  for (long long row = blockIdx.y * kRowsHigh + threadIdx.y; row < rows; row += step) {
    const long long at = row * cols + column;
    float v[V];
    load(x + at, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = Op::apply(v[j], m[j]);
    store(y + at, v);
  }
}

// What a backward kernel does with one element: dx, and the term of its column's sum.
struct BiasGradient {
  static constexpr bool kReadsX = false, kGated = false, kWrites = false;
  static __device__ __forceinline__ void apply(float dy, float, float, float&, float& term) {
    term = dy;
  }
};
struct GeluBackward {
  static constexpr bool kReadsX = true, kGated = false, kWrites = true;
  static __device__ __forceinline__ void apply(float dy, float x, float, float& dx, float& term) {
    dx = dy * gelu_slope(x);
    term = dx;
  }
};
struct GatedGeluBackward {
  static constexpr bool kReadsX = true, kGated = true, kWrites = true;
  static __device__ __forceinline__ void apply(float dy, float x, float mass, float& dx,
                                               float& term) {
    dx = dy * mass * gelu_slope(x);
    term = dy * gelu_one(x);
  }
};
struct HeadGateBackward {
  static constexpr bool kReadsX = true, kGated = true, kWrites = true;
  static __device__ __forceinline__ void apply(float dy, float x, float mass, float& dx,
                                               float& term) {
    dx = dy * mass;
    term = dy * x;
  }
};

template <class Op, class T, int V>
__global__ void __launch_bounds__(kLanes* kRowsHigh)
    column_kernel(const T* __restrict__ dy, long long ld, const T* __restrict__ x,
                  const float* __restrict__ mass, T* __restrict__ dx, float* __restrict__ partial,
                  long long rows, int cols, int head_dim) {
  SHARED(float, sums, [kRowsHigh][kLanes * V]);
  const int left = static_cast<int>(blockIdx.x) * kLanes * V;
  const int column = left + static_cast<int>(threadIdx.x) * V;
  float sum[V], m[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = m[j] = 0.f;
  if (column < cols) {
    if constexpr (Op::kGated) load_mass(mass, column, head_dim, m);
    const long long step = static_cast<long long>(gridDim.y) * kRowsHigh;
#pragma unroll 2
    for (long long row = blockIdx.y * kRowsHigh + threadIdx.y; row < rows; row += step) {
      float g[V], v[V], d[V];
      load(dy + row * ld + column, g);
      if constexpr (Op::kReadsX) load(x + row * cols + column, v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float term;
        Op::apply(g[j], Op::kReadsX ? v[j] : 0.f, m[j], d[j], term);
        sum[j] += term;
      }
      if constexpr (Op::kWrites) store(dx + row * cols + column, d);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums[threadIdx.y][threadIdx.x * V + j] = sum[j];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y * kLanes + threadIdx.x);
  for (int c = thread; c < kLanes * V && left + c < cols; c += kLanes * kRowsHigh) {
    float total = 0.f;
#pragma unroll
    for (int r = 0; r < kRowsHigh; ++r) total += sums[r][c];
    partial[static_cast<long long>(blockIdx.y) * cols + left + c] = total;
  }
}

// result (groups, total): sums over the lines of partial (groups, lines, cols), zero beyond cols.
template <class T>
__global__ void __launch_bounds__(kLanes* kRowsHigh)
    add_partials_kernel(const float* __restrict__ partial, int lines, int cols,
                        T* __restrict__ result, int total) {
  SHARED(float, sums, [kRowsHigh][kLanes]);
  const int column = static_cast<int>(blockIdx.x * kLanes + threadIdx.x);
  const float* mine = partial + static_cast<long long>(blockIdx.y) * lines * cols;
  float sum = 0.f;
  if (column < cols) {
    for (int line = static_cast<int>(threadIdx.y); line < lines; line += kRowsHigh) {
      sum += mine[static_cast<long long>(line) * cols + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < total) {
    float all = 0.f;
#pragma unroll
    for (int r = 0; r < kRowsHigh; ++r) all += sums[r][threadIdx.x];
    from_float(all, result[static_cast<long long>(blockIdx.y) * total + column]);
  }
}

// dmass[head]: the sum over all lines and over the head's columns. One block per head.
__global__ void __launch_bounds__(kThreads)
    add_heads_kernel(const float* __restrict__ partial, int lines, int heads, int head_dim,
                     float* __restrict__ dmass) {
  SHARED(float, sums, [kThreads / 32]);
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.f;
  for (int k = thread; k < lines * head_dim; k += kThreads) {
    const int line = k / head_dim, column = static_cast<int>(blockIdx.x) * head_dim + k % head_dim;
    sum += partial[static_cast<long long>(line) * heads * head_dim + column];
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float all = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) all += sums[w];
    dmass[blockIdx.x] = all;
  }
}

// --------------------------------------------------------------------------------- gated norm
// Forward: a warp per row, which reads its row three times, from L1 after the first.
constexpr int kWarps = 8;

template <class T, int V>
__global__ void __launch_bounds__(kWarps * 32)
    norm_kernel(const T* __restrict__ x, const float* __restrict__ mass,
                const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
                float* __restrict__ stats, long long rows, int cols, float eps) {
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;  // the whole warp leaves
  const T* mine = x + row * cols;
  const int first = static_cast<int>(threadIdx.x) * V;
  float weighted = 0.f, total = 0.f;
  for (int c = first; c < cols; c += 32 * V) {
    float v[V], m[V];
    load(mine + c, v);
    load(mass + c, m);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      weighted += m[j] * v[j];
      total += m[j];
    }
  }
  total = warp_sum(total);
  const float mean = warp_sum(weighted) / total;
  float squares = 0.f;
  for (int c = first; c < cols; c += 32 * V) {
    float v[V], m[V];
    load(mine + c, v);
    load(mass + c, m);
#pragma unroll
    for (int j = 0; j < V; ++j) squares += m[j] * (v[j] - mean) * (v[j] - mean);
  }
  const float rstd = rsqrtf(warp_sum(squares) / total + eps);
#pragma unroll 1
  for (int c = first; c < cols; c += 32 * V) {
    float v[V], m[V], w[V], b[V];
    load(mine + c, v);
    load(mass + c, m);
    load(weight + c, w);
    load(bias + c, b);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = m[j] * ((v[j] - mean) * rstd * w[j] + b[j]);
    store(y + row * cols + c, v);
  }
  if (threadIdx.x == 0) {
    stats[2 * row] = mean;
    stats[2 * row + 1] = rstd;
  }
}

// Sums of three numbers over the block. Two buffers taken in turns, so that one barrier is enough:
// a thread writes a buffer again only after a barrier that follows all reads of it.
struct Three {
  float a, b, c;
};

__device__ __forceinline__ Three block_sum(Three s, float (*buffer)[3]) {
  s = {warp_sum(s.a), warp_sum(s.b), warp_sum(s.c)};
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % 32 == 0) {
    buffer[thread / 32][0] = s.a;
    buffer[thread / 32][1] = s.b;
    buffer[thread / 32][2] = s.c;
  }
  __syncthreads();
  s = {0.f, 0.f, 0.f};
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    s.a += buffer[w][0];
    s.b += buffer[w][1];
    s.c += buffer[w][2];
  }
  return s;
}

// Backward. With h = (x - mean) rstd, a = dy mass w rstd, share = mass / S and, over the row,
// A = sum a, B = sum a h, C = sum share h^2 = var rstd^2:
//   dx    = a - share (A + h B)
//   dmass = dy (h w + b) - (A h + B (h^2 - C) / 2) / (S rstd), summed over the rows
// A block per row in turns; a thread owns columns, and their sums in shared memory.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                         const float* __restrict__ mass, const T* __restrict__ weight,
                         const T* __restrict__ bias, const float* __restrict__ stats,
                         T* __restrict__ dx, float* __restrict__ partial, long long rows,
                         int cols) {
  DYN_SHARED(float, dmass);
  SHARED(float, buffer, [2][kThreads / 32][3]);
  const int first = static_cast<int>(threadIdx.x) * V, step = static_cast<int>(blockDim.x) * V;
  float mass_here = 0.f;
  for (int c = first; c < cols; c += step) {
    float m[V];
    load(mass + c, m);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mass_here += m[j];
      dmass[c + j] = 0.f;
    }
  }
  const float per_mass = 1.f / block_sum({mass_here, 0.f, 0.f}, buffer[1]).a;
  int turn = 0;
  for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
    const long long at = row * cols;
    const float mean = stats[2 * row], rstd = stats[2 * row + 1];
    Three s{0.f, 0.f, 0.f};
    for (int c = first; c < cols; c += step) {
      float g[V], v[V], m[V], w[V];
      load(dy + at + c, g);
      load(x + at + c, v);
      load(mass + c, m);
      load(weight + c, w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float h = (v[j] - mean) * rstd, a = g[j] * m[j] * w[j] * rstd;
        s.a += a;
        s.b += a * h;
        s.c += m[j] * h * h;
      }
    }
    s = block_sum(s, buffer[turn]);
    turn ^= 1;
    const float half_b = 0.5f * s.b, square = s.c * per_mass, scale = per_mass / rstd;
    for (int c = first; c < cols; c += step) {
      float g[V], v[V], m[V], w[V], b[V], sum[V];
      load(dy + at + c, g);
      load(x + at + c, v);
      load(mass + c, m);
      load(weight + c, w);
      load(bias + c, b);
      load(dmass + c, sum);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float h = (v[j] - mean) * rstd, a = g[j] * m[j] * w[j] * rstd;
        sum[j] += g[j] * (h * w[j] + b[j]) - scale * (s.a * h + half_b * (h * h - square));
        v[j] = a - m[j] * per_mass * (s.a + h * s.b);
      }
      store(dmass + c, sum);
      store(dx + at + c, v);
    }
  }
  for (int c = first; c < cols; c += step) {
    float sum[V];
    load(dmass + c, sum);
    store(partial + static_cast<long long>(blockIdx.x) * cols + c, sum);
  }
}

// ---------------------------------------------------------------- launchers, shared by both builds
// Whether 16-byte accesses are right: every pointer and every row distance (in bytes) fits.
template <class... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int divide_up(long long a, long long b) { return static_cast<int>((a + b - 1) / b); }

inline void launch_adamw(AdamBatch& b, cudaStream_t stream) {
  bool wide = aligned(b.param, b.grad, b.exp_avg, b.exp_avg_sq);
  for (int k = 0; k < b.count; ++k) {
    const AdamBox& box = b.box[k];
    wide =
        wide && box.offset % 4 == 0 && box.cols % 4 == 0 && (box.stride % 4 == 0 || box.rows == 1);
  }
  int blocks = 0;
  for (int k = 0; k < b.count; ++k) {
    AdamBox& box = b.box[k];
    box.first_block = blocks;
    const long long elements = static_cast<long long>(box.rows) * box.cols;
    blocks += divide_up(elements / (wide ? 4 : 1), kVectorsPerBlock);
  }
  if (blocks == 0) return;
  if (wide) {
    LAUNCH(adamw_kernel<4>, blocks, kThreads, 0, stream, b);
  } else {
    LAUNCH(adamw_kernel<1>, blocks, kThreads, 0, stream, b);
  }
}

template <class T>
void launch_gelu(const T* x, T* y, long long count, cudaStream_t stream) {
  if (count == 0) return;
  if (aligned(x, y)) {
    const int blocks = divide_up(count, kThreads * kWide<T>);
    LAUNCH((gelu_kernel<T, kWide<T>>), blocks, kThreads, 0, stream, x, y, count);
  } else {
    LAUNCH((gelu_kernel<T, 1>), divide_up(count, kThreads), kThreads, 0, stream, x, y, count);
  }
}

// How many blocks share the rows: about 2000 blocks in all, at least 32 rows each. It must not
// depend on the path taken, as callers allocate the partial sums by it.
inline int blocks_along_rows(long long rows, long long cols) {
  const int strips = divide_up(cols, 128);
  const int wanted = strips < 2048 ? 2048 / (strips > 0 ? strips : 1) : 1;
  const int most = rows > 32 ? divide_up(rows < (1 << 30) ? rows : (1 << 30), 32) : 1;
  return wanted < most ? wanted : most;
}

template <class Op, class T>
void launch_gate(const T* x, const float* mass, T* y, long long rows, int cols, int head_dim,
                 cudaStream_t stream) {
  if (rows == 0 || cols == 0) return;
  const dim3 block(kLanes, kRowsHigh);
  const unsigned down = blocks_along_rows(rows, cols);
  if (aligned(x, y) && cols % kWide<T> == 0) {
    const dim3 grid(divide_up(cols, kLanes * kWide<T>), down);
    LAUNCH((gate_kernel<Op, T, kWide<T>>), grid, block, 0, stream, x, mass, y, rows, cols,
           head_dim);
  } else {
    const dim3 grid(divide_up(cols, kLanes), down);
    LAUNCH((gate_kernel<Op, T, 1>), grid, block, 0, stream, x, mass, y, rows, cols, head_dim);
  }
}

template <class Op, class T>
void launch_columns(const T* dy, long long ld, const T* x, const float* mass, T* dx, float* partial,
                    long long rows, int cols, int head_dim, cudaStream_t stream) {
  if (cols == 0) return;  // without rows the sums are still zeros
  const dim3 block(kLanes, kRowsHigh);
  const unsigned down = blocks_along_rows(rows, cols);
  if (aligned(dy, x, dx) && ld % kWide<T> == 0 && cols % kWide<T> == 0) {
    const dim3 grid(divide_up(cols, kLanes * kWide<T>), down);
    LAUNCH((column_kernel<Op, T, kWide<T>>), grid, block, 0, stream, dy, ld, x, mass, dx, partial,
           rows, cols, head_dim);
  } else {
    const dim3 grid(divide_up(cols, kLanes), down);
    LAUNCH((column_kernel<Op, T, 1>), grid, block, 0, stream, dy, ld, x, mass, dx, partial, rows,
           cols, head_dim);
  }
}

template <class T>
void launch_add_partials(const float* partial, int lines, int groups, int cols, T* result,
                         int total, cudaStream_t stream) {
  if (total == 0 || groups == 0) return;
  const dim3 grid(divide_up(total, kLanes), groups), block(kLanes, kRowsHigh);
  LAUNCH(add_partials_kernel<T>, grid, block, 0, stream, partial, lines, cols, result, total);
}

inline void launch_add_heads(const float* partial, int lines, int heads, int head_dim, float* dmass,
                             cudaStream_t stream) {
  if (heads == 0) return;
  LAUNCH(add_heads_kernel, heads, kThreads, 0, stream, partial, lines, heads, head_dim, dmass);
}

template <class T>
void launch_norm(const T* x, const float* mass, const T* weight, const T* bias, T* y, float* stats,
                 long long rows, int cols, float eps, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return;
  const dim3 grid(divide_up(rows, kWarps)), block(32, kWarps);
  if (aligned(x, mass, weight, bias, y) && cols % kWide<T> == 0) {
    LAUNCH((norm_kernel<T, kWide<T>>), grid, block, 0, stream, x, mass, weight, bias, y, stats,
           rows, cols, eps);
  } else {
    LAUNCH((norm_kernel<T, 1>), grid, block, 0, stream, x, mass, weight, bias, y, stats, rows, cols,
           eps);
  }
}

inline int blocks_of_norm(long long rows) {
  return rows < 4 ? 1 : static_cast<int>(rows / 4 < 512 ? rows / 4 : 512);
}

template <class T>
void launch_norm_backward(const T* dy, const T* x, const float* mass, const T* weight,
                          const T* bias, const float* stats, T* dx, float* partial, long long rows,
                          int cols, cudaStream_t stream) {
  if (cols == 0) return;
  const int grid = blocks_of_norm(rows);
  const bool wide = aligned(dy, x, mass, weight, bias, dx, partial) && cols % kWide<T> == 0;
  const int warps = divide_up(cols, 32 * (wide ? kWide<T> : 1));
  const int threads = 32 * (warps < kThreads / 32 ? warps : kThreads / 32);
  const size_t bytes = static_cast<size_t>(cols) * sizeof(float);
  if (wide) {
    LAUNCH((norm_backward_kernel<T, kWide<T>>), grid, threads, bytes, stream, dy, x, mass, weight,
           bias, stats, dx, partial, rows, cols);
  } else {
    LAUNCH((norm_backward_kernel<T, 1>), grid, threads, bytes, stream, dy, x, mass, weight, bias,
           stats, dx, partial, rows, cols);
  }
}

inline void launch_zero_outside(void* dw, int64_t groups, int64_t total_out, int64_t total_in,
                                int64_t out, int64_t in, size_t element, cudaStream_t stream) {
  auto* base = static_cast<char*>(dw);
  const size_t row = total_in * element, matrix = total_out * row;
  if (out < total_out) {  // rows below the block, of all groups at once
    cudaMemset2DAsync(base + out * row, matrix, 0, (total_out - out) * row, groups, stream);
  }
  for (int64_t g = 0; in < total_in && g < groups; ++g) {  // columns right of it
    cudaMemset2DAsync(base + g * matrix + in * element, row, 0, (total_in - in) * element, out,
                      stream);
  }
}

}  // namespace vimnas::cuda
