// Matrix products through cuBLASLt, with leading dimensions, so that a block of a larger weight is
// read and written where it stands. Free of torch types: the tests link it against a stand-in for
// cuBLASLt (tests/cuda/lt_on_host.cpp) and check every descriptor without a GPU.
#pragma once
#include <cublasLt.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace vimnas::lt {

inline void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string("cublasLt: ") + what + " failed with status " +
                           std::to_string(static_cast<int>(status)));
}
#define LT_CHECK(X) ::vimnas::lt::check((X), #X)

template <class T, cublasStatus_t (*Destroy)(T)>
struct Owned {
  T handle{};
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle) Destroy(handle);
  }
};
using Desc = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

// Row-major D[m, n] = op(A) op(B) + beta D, `batch` times at the given strides (in elements).
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;  // stored [m, k], or [k, m] when transposed
  int64_t lda = 0;
  bool transpose_a = false;
  const void* b = nullptr;  // stored [k, n], or [n, k] when transposed
  int64_t ldb = 0;
  bool transpose_b = false;
  void* d = nullptr;
  int64_t ldd = 0;
  float beta = 0.f;
  cudaDataType_t type = CUDA_R_32F;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;  // n numbers per batch entry
  int64_t bias_stride = 0;
  void* aux = nullptr;  // [m, n], dense: the values before GELU
  int batch = 1;
  int64_t stride_a = 0, stride_b = 0, stride_d = 0;

  int64_t element() const { return type == CUDA_R_32F ? 4 : 2; }
};

struct Context {
  cublasLtHandle_t handle = nullptr;
  int device = 0;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;
};

// The largest power of two, at most 256, that divides the address of every matrix of a batch.
inline uint32_t alignment(const void* p, int64_t stride_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride_bytes);
  uint32_t a = 256;
  while (bits % a) a /= 2;
  return a;
}

// Everything that decides which algorithms are valid.
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int,
                       int, int, uint32_t, uint32_t, uint32_t, bool>;

inline Key key_of(const Gemm& g, int device) {
  return {device,
          g.m,
          g.n,
          g.k,
          g.lda,
          g.ldb,
          g.ldd,
          g.transpose_a * 2 + g.transpose_b,
          static_cast<int>(g.type),
          static_cast<int>(g.compute),
          static_cast<int>(g.epilogue),
          g.batch,
          alignment(g.a, g.stride_a * g.element()),
          alignment(g.b, g.stride_b * g.element()),
          alignment(g.d, g.stride_d * g.element()),
          g.beta != 0.f};
}

inline void describe(const Gemm& g, Desc& op) {
  LT_CHECK(cublasLtMatmulDescCreate(&op.handle, g.compute, CUDA_R_32F));
  auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    LT_CHECK(cublasLtMatmulDescSetAttribute(op.handle, attribute, &value, sizeof value));
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, g.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, g.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, g.epilogue);
  if (g.bias) {
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, g.type);
    if (g.batch > 1) set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, g.bias_stride);
  }
  if (g.aux) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, g.aux);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, g.n);
    if (g.batch > 1) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, g.m * g.n);
  }
}

inline void lay_out(const Gemm& g, Layout& layout, int64_t rows, int64_t cols, int64_t ld,
                    int64_t stride) {
  LT_CHECK(cublasLtMatrixLayoutCreate(&layout.handle, g.type, rows, cols, ld));
  if (g.batch == 1) return;
  LT_CHECK(cublasLtMatrixLayoutSetAttribute(layout.handle, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                            &g.batch, sizeof g.batch));
  LT_CHECK(cublasLtMatrixLayoutSetAttribute(
      layout.handle, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
}

inline cublasLtMatmulAlgo_t algorithm(const Context& c, const Gemm& g, const Desc& op,
                                      const Layout& a, const Layout& b, const Layout& d) {
  static std::map<Key, cublasLtMatmulAlgo_t> cache;
  static std::mutex mutex;
  const Key key = key_of(g, c.device);
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = cache.find(key); found != cache.end()) return found->second;
  }
  Preference preference;
  LT_CHECK(cublasLtMatmulPreferenceCreate(&preference.handle));
  auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    LT_CHECK(
        cublasLtMatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof value));
  };
  const uint32_t align_d = alignment(g.d, g.stride_d * g.element());
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, c.workspace_bytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(g.b, g.stride_b * g.element()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(g.a, g.stride_a * g.element()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align_d);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align_d);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  LT_CHECK(cublasLtMatmulAlgoGetHeuristic(c.handle, op.handle, a.handle, b.handle, d.handle,
                                          d.handle, preference.handle, 1, &result, &found));
  if (!found) throw std::runtime_error("cublasLt: no algorithm for this shape");
  std::lock_guard<std::mutex> lock(mutex);
  return cache.emplace(key, result.algo).first->second;
}

// cuBLASLt is column-major, where row-major D = A B reads D^T = B^T A^T: A and B change places.
inline void run(const Context& c, const Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  Desc op;
  Layout a, b, d;
  describe(g, op);
  lay_out(g, a, g.transpose_b ? g.k : g.n, g.transpose_b ? g.n : g.k, g.ldb, g.stride_b);
  lay_out(g, b, g.transpose_a ? g.m : g.k, g.transpose_a ? g.k : g.m, g.lda, g.stride_a);
  lay_out(g, d, g.n, g.m, g.ldd, g.stride_d);
  const cublasLtMatmulAlgo_t algo = algorithm(c, g, op, a, b, d);
  const float alpha = 1.f;
  LT_CHECK(cublasLtMatmul(c.handle, op.handle, &alpha, g.b, a.handle, g.a, b.handle, &g.beta, g.d,
                          d.handle, g.d, d.handle, &algo, c.workspace, c.workspace_bytes,
                          c.stream));
}

// ------------------------------------------------------- the three products of a sliced linear
struct Block {  // the leading out x in block of weight (groups, total_out, total_in)
  int64_t rows, out, in, groups, total_out, total_in;
  cudaDataType_t type;

  int64_t matrix() const { return total_out * total_in; }
};

// cuBLASLt's conditions for keeping the values before GELU.
inline bool gelu_epilogue_fits(const Block& s, const void* pre) {
  return s.out % 8 == 0 && reinterpret_cast<uintptr_t>(pre) % 16 == 0;
}

// y[g] = x W[g]^T + bias[g], dense (groups, rows, out), in one call. With `pre` it receives that
// and y its GELU.
inline Gemm forward(const Block& s, const void* x, int64_t ldx, const void* weight,
                    const void* bias, void* y, void* pre) {
  Gemm g;
  g.m = s.rows, g.n = s.out, g.k = s.in, g.type = s.type;
  g.a = x, g.lda = ldx;
  g.b = weight, g.ldb = s.total_in, g.transpose_b = true;
  g.d = y, g.ldd = s.out;
  g.bias = bias, g.bias_stride = s.total_out;
  g.epilogue = pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_BIAS;
  g.aux = pre;
  g.batch = static_cast<int>(s.groups);
  g.stride_b = s.matrix(), g.stride_d = s.rows * s.out;
  return g;
}

// dx = dy W[group], added to dx for every group after the first.
inline Gemm grad_input(const Block& s, const void* dy, int64_t lddy, const void* weight,
                       int64_t group, void* dx) {
  Gemm g;
  g.m = s.rows, g.n = s.in, g.k = s.out, g.type = s.type;
  g.a = dy, g.lda = lddy;
  g.b = static_cast<const char*>(weight) + group * s.matrix() * g.element(), g.ldb = s.total_in;
  g.d = dx, g.ldd = s.in;
  g.beta = group == 0 ? 0.f : 1.f;
  return g;
}

// dW[group + b] = dy[b]^T x, written into the blocks of dW, for `batch` groups at once whose dy
// stand `stride` elements apart.
inline Gemm grad_weight(const Block& s, const void* dy, int64_t lddy, int64_t stride, const void* x,
                        int64_t ldx, void* dw, int64_t group, int batch) {
  Gemm g;
  g.m = s.out, g.n = s.in, g.k = s.rows, g.type = s.type;
  g.a = dy, g.lda = lddy, g.transpose_a = true;
  g.b = x, g.ldb = ldx;
  g.d = static_cast<char*>(dw) + group * s.matrix() * g.element(), g.ldd = s.total_in;
  g.batch = batch;
  g.stride_a = stride, g.stride_d = s.matrix();
  return g;
}

}  // namespace vimnas::lt
