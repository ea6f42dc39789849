// A stand-in for cuBLASLt on the host: honours layouts, transposes, batches, beta and the epilogues
// the project uses, and refuses what the real library documents as invalid.  Link it instead of
// libcublasLt to check descriptor arithmetic without a GPU.  (Types come from the real cublasLt.h.)
#include <cmath>
#include <cstring>
#include <vector>

#include "lt_gemm.h"
namespace {
struct MDesc {
  cublasComputeType_t ct;
  cudaDataType_t st;
  int32_t ta = 0, tb = 0;
  uint32_t epi = CUBLASLT_EPILOGUE_DEFAULT;
  void* bias = nullptr;
  int32_t bias_t = -1;
  int64_t bias_stride = 0;
  void* aux = nullptr;
  int64_t aux_ld = 0;
  int64_t aux_stride = 0;
  int32_t aux_t = -1;
};
struct MLayout {
  cudaDataType_t t;
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch = 1;
  int64_t stride = 0;
};
static_assert(sizeof(MDesc) <= sizeof(cublasLtMatmulDescOpaque_t) &&
              sizeof(MLayout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
MDesc* D(cublasLtMatmulDesc_t d) { return reinterpret_cast<MDesc*>(d); }
const MLayout* L(cublasLtMatrixLayout_t l) { return reinterpret_cast<const MLayout*>(l); }
size_t bytes(int t) { return t == CUDA_R_32F ? 4 : 2; }
float get(int t, const void* p, int64_t i) {
  if (t == CUDA_R_32F) return static_cast<const float*>(p)[i];
  uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (t == CUDA_R_16F) {
    _Float16 f;
    memcpy(&f, &h, 2);
    return float(f);
  }
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
void put(int t, void* p, int64_t i, float v) {
  if (t == CUDA_R_32F) {
    static_cast<float*>(p)[i] = v;
    return;
  }
  uint16_t h;
  if (t == CUDA_R_16F) {
    _Float16 f = _Float16(v);
    memcpy(&h, &f, 2);
  } else {
    uint32_t u;
    memcpy(&u, &v, 4);
    h = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  static_cast<uint16_t*>(p)[i] = h;
}
int heuristic_calls = 0;
constexpr double kC = 0.7978845608028654, kA = 0.044715;  // cuBLASLt's GELU is the tanh form
double gelu(double x) { return 0.5 * x * (1 + std::tanh(kC * (x + kA * x * x * x))); }
double dgelu(double x) {
  double t = std::tanh(kC * (x + kA * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * kC * (1 + 3 * kA * x * x);
}
}  // namespace
extern "C" {
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t c,
                                        cudaDataType_t s) {
  *d = new cublasLtMatmulDescOpaque_t{};
  *D(*d) = MDesc{c, s};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete d;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t a, const void* v,
                                              size_t n) {
  auto set = [&](auto& f) {
    if (n != sizeof f) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&f, v, n);
    return CUBLAS_STATUS_SUCCESS;
  };
  MDesc& m = *D(d);
  switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(m.ta);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(m.tb);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(m.epi);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(m.bias);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return set(m.bias_t);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
      return set(m.bias_stride);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return set(m.aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return set(m.aux_ld);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
      return set(m.aux_stride);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
      return set(m.aux_t);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType t, uint64_t r,
                                          uint64_t c, int64_t ld) {
  if (ld < int64_t(r)) return CUBLAS_STATUS_INVALID_VALUE;  // column order
  *l = new cublasLtMatrixLayoutOpaque_t{};
  *reinterpret_cast<MLayout*>(*l) = MLayout{t, r, c, ld};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete l;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t a, const void* v,
                                                size_t n) {
  auto* m = reinterpret_cast<MLayout*>(l);
  if (a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && n == 4)
    memcpy(&m->batch, v, 4);
  else if (a == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET && n == 8)
    memcpy(&m->stride, v, 8);
  else
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  *p = new cublasLtMatmulPreferenceOpaque_t{};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t r[], int* n) {
  ++heuristic_calls;
  r[0] = {};
  *n = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t la, const void* B,
                              cublasLtMatrixLayout_t lb, const void* beta, const void* C,
                              cublasLtMatrixLayout_t lc, void* Dp, cublasLtMatrixLayout_t ld,
                              const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
  const MDesc& d = *D(desc);
  const MLayout &a = *L(la), &b = *L(lb), &c = *L(lc), &o = *L(ld);
  const int64_t m = o.rows, n = o.cols, k = d.ta ? a.rows : a.cols;
  const float al = *static_cast<const float*>(alpha), be = *static_cast<const float*>(beta);
  const uint32_t e = d.epi;
  const bool bias = e & 4, gel = e & 32, dgel = e & 64, aux = e & 128, bgrad = e & 16;
  if (int64_t(d.ta ? a.cols : a.rows) != m || int64_t(d.tb ? b.cols : b.rows) != k ||
      int64_t(d.tb ? b.rows : b.cols) != n || c.rows != o.rows || c.cols != o.cols || a.t != b.t ||
      c.t != o.t)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (a.batch != o.batch || b.batch != o.batch || c.batch != o.batch)
    return CUBLAS_STATUS_INVALID_VALUE;
  if ((bias || bgrad) && !d.bias) return CUBLAS_STATUS_INVALID_VALUE;
  if (aux && (!d.aux || d.aux_stride % 8 || d.aux_ld % 8 || d.aux_ld < m ||
              reinterpret_cast<uintptr_t>(d.aux) % 16))
    return CUBLAS_STATUS_INVALID_VALUE;
  if (e & (2 | 8 | 256 | 512)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const int bt = d.bias_t < 0 ? int(o.t) : d.bias_t, at = d.aux_t < 0 ? int(o.t) : d.aux_t;
  for (int64_t s = 0; s < o.batch; ++s) {
    std::vector<double> bg(bgrad ? m : 0);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        double acc = 0;
        for (int64_t q = 0; q < k; ++q)
          acc += double(get(a.t, A, s * a.stride + (d.ta ? q + i * a.ld : i + q * a.ld))) *
                 get(b.t, B, s * b.stride + (d.tb ? j + q * b.ld : q + j * b.ld));
        double v = al * acc;
        if (be != 0) v += be * double(get(c.t, C, s * c.stride + i + j * c.ld));
        if (bias) v += get(bt, d.bias, s * d.bias_stride + i);
        if (gel) {
          if (aux) put(at, d.aux, s * d.aux_stride + i + j * d.aux_ld, float(v));
          v = gelu(v);
        }
        if (dgel) v *= dgelu(get(at, d.aux, s * d.aux_stride + i + j * d.aux_ld));
        if (bgrad) bg[i] += v;
        put(o.t, Dp, s * o.stride + i + j * o.ld, float(v));
      }
    for (int64_t i = 0; i < int64_t(bg.size()); ++i) put(bt, d.bias, i, float(bg[i]));
  }
  return CUBLAS_STATUS_SUCCESS;
}
}  // extern "C"

// What the tests call. shape: rows, out, in, groups, total_out, total_in.
static std::string last;
static vimnas::lt::Context host(int device) {
  vimnas::lt::Context c;
  c.device = device;
  return c;
}
template <class F>
static int guarded(F call) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    last = e.what();
    return 1;
  }
}
static vimnas::lt::Block block(const int64_t* s, int bf16) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], bf16 ? CUDA_R_16BF : CUDA_R_32F};
}
extern "C" {
const char* lt_error() { return last.c_str(); }
int lt_heuristics() { return heuristic_calls; }
int lt_forward(const int64_t* shape, int bf16, const void* x, int64_t ldx, const void* weight,
               const void* bias, void* y, void* pre, int device) {
  return guarded([&] {
    vimnas::lt::run(host(device),
                    vimnas::lt::forward(block(shape, bf16), x, ldx, weight, bias, y, pre));
  });
}
int lt_grad_input(const int64_t* shape, int bf16, const void* dy, int64_t lddy, const void* weight,
                  int64_t group, void* dx) {
  return guarded([&] {
    vimnas::lt::run(host(0),
                    vimnas::lt::grad_input(block(shape, bf16), dy, lddy, weight, group, dx));
  });
}
int lt_grad_weight(const int64_t* shape, int bf16, const void* dy, int64_t lddy, int64_t stride,
                   const void* x, int64_t ldx, void* dw, int64_t group, int batch) {
  return guarded([&] {
    vimnas::lt::run(host(0), vimnas::lt::grad_weight(block(shape, bf16), dy, lddy, stride, x, ldx,
                                                     dw, group, batch));
  });
}
int lt_gelu_fits(const int64_t* shape, const void* pre) {
  return vimnas::lt::gelu_epilogue_fits(block(shape, 0), pre);
}
}
