// The operators on CUDA tensors: checks, allocation, and calls of cuBLASLt and of kernels.cu.
//
// Everything is enqueued on the current stream; nothing waits for the device.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "lt_gemm.h"
#include "params.h"

namespace vimnas {
namespace {

using at::Tensor;

cuda::Type type_of(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return cuda::Type::kFloat32;
  TORCH_CHECK_NOT_IMPLEMENTED(t.scalar_type() == at::kBFloat16,
                              "on CUDA float32 and bfloat16 are supported, not ", t.scalar_type());
  return cuda::Type::kBFloat16;
}

cudaDataType_t lt_type_of(const Tensor& t) {
  return type_of(t) == cuda::Type::kFloat32 ? CUDA_R_32F : CUDA_R_16BF;
}

void* stream() { return at::cuda::getCurrentCUDAStream().stream(); }

int narrow(int64_t value) {
  TORCH_CHECK(value <= std::numeric_limits<int>::max(), "a dimension of ", value, " is too large");
  return static_cast<int>(value);
}

Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

Tensor partial_sums(const Tensor& like, int64_t numel) {
  return at::empty({numel}, like.options().dtype(at::kFloat));
}

// A (..., n) tensor as rows at one distance; copied only where it has no such form.
struct Rows {
  Tensor tensor;  // keeps the memory
  int64_t ld;
};

Rows rows_of(const Tensor& t) {
  const int64_t n = t.size(-1);
  if (t.numel() == 0 || t.is_contiguous()) return {t, n};
  bool strided = t.stride(-1) == 1 || n == 1, single = true;
  int64_t ld = n, expected = 0;
  for (int64_t d = t.dim() - 2; d >= 0 && strided; --d) {
    if (t.size(d) == 1) continue;
    if (single) ld = expected = t.stride(d);
    single = false;
    strided = t.stride(d) == expected;
    expected *= t.size(d);
  }
  if (!strided || ld < n) return {t.contiguous(), n};
  return {t, ld};
}

// ------------------------------------------------------------------------------- sliced linear
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

void multiply(lt::Gemm gemm) {
  constexpr size_t kWorkspace = 32u << 20;
  if (gemm.type == CUDA_R_32F && allow_tf32()) {
    gemm.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
  }
  const auto workspace = c10::cuda::CUDACachingAllocator::get()->allocate(kWorkspace);
  const auto current = at::cuda::getCurrentCUDAStream();
  lt::run({at::cuda::getCurrentCUDABlasLtHandle(), current.device_index(), workspace.get(),
           kWorkspace, current.stream()},
          gemm);
}

lt::Block block_of(const Tensor& x, const Tensor& weight, int64_t out) {
  const int64_t in = x.size(-1);
  return {in ? x.numel() / in : 0, out,          in, weight.size(0), weight.size(1),
          weight.size(2),          lt_type_of(x)};
}

std::tuple<Tensor, Tensor> sliced_linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                         int64_t out_features, bool gelu) {
  check_linear(x, weight, bias, out_features);
  const c10::cuda::CUDAGuard guard(x.device());
  const lt::Block block = block_of(x, weight, out_features);
  std::vector<int64_t> shape{block.groups};
  shape.insert(shape.end(), x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = at::empty(shape, x.options());
  Tensor pre = gelu ? at::empty(shape, x.options()) : none(x);
  if (y.numel() == 0) return {y, pre};
  const Rows rows = rows_of(x);
  const bool fused = gelu && lt::gelu_epilogue_fits(block, pre.const_data_ptr());
  Tensor& linear = gelu && !fused ? pre : y;
  multiply(lt::forward(block, rows.tensor.const_data_ptr(), rows.ld, weight.const_data_ptr(),
                       bias.const_data_ptr(), linear.mutable_data_ptr(),
                       fused ? pre.mutable_data_ptr() : nullptr));
  if (gelu && !fused) {
    cuda::gelu(type_of(x), pre.const_data_ptr(), y.mutable_data_ptr(), y.numel(), stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {y, pre};
}

// How far apart, in elements, the dy of all groups stand; -1 if not equally far or not alike.
int64_t common_stride(const std::vector<Rows>& dy) {
  if (dy.size() == 1) return 0;
  const int64_t element = dy[0].tensor.element_size();
  auto address = [&](size_t g) {
    return reinterpret_cast<intptr_t>(dy[g].tensor.const_data_ptr());
  };
  const int64_t distance = address(1) - address(0);
  for (size_t g = 1; g < dy.size(); ++g) {
    if (dy[g].ld != dy[0].ld || address(g) - address(g - 1) != distance) return -1;
  }
  return distance > 0 && distance % element == 0 ? distance / element : -1;
}

// The bias gradient of every group and, with `pre`, dy times the slope of GELU in the same pass,
// which replaces dy.
Tensor backward_columns(std::vector<Rows>& dy, const Tensor& pre, const lt::Block& block,
                        bool need_db) {
  const Tensor& like = dy[0].tensor;
  const bool gelu = pre.numel() > 0;
  const cuda::Type type = type_of(like);
  const int blocks = cuda::column_blocks(block.rows, block.out);
  const int64_t lines = int64_t{blocks} * block.out;
  const Tensor partial = partial_sums(like, block.groups * lines);
  const Tensor saved = pre.contiguous();
  const Tensor dpre = gelu ? at::empty(pre.sizes(), pre.options()) : none(like);
  for (int64_t g = 0; g < block.groups; ++g) {
    const void* gradient = dy[g].tensor.const_data_ptr();
    float* sums = partial.data_ptr<float>() + g * lines;
    if (gelu) {
      cuda::gelu_backward(type, gradient, dy[g].ld, saved[g].const_data_ptr(),
                          dpre[g].mutable_data_ptr(), sums, block.rows, block.out, stream());
      dy[g] = {dpre[g], block.out};
    } else {
      cuda::bias_gradient(type, gradient, dy[g].ld, sums, block.rows, block.out, stream());
    }
  }
  Tensor db = need_db ? at::empty({block.groups, block.total_out}, like.options()) : none(like);
  if (need_db) {
    cuda::finish_bias(type, partial.const_data_ptr<float>(), blocks, narrow(block.groups),
                      block.out, db.mutable_data_ptr(), block.total_out, stream());
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return db;
}

Tensor backward_weight(const std::vector<Rows>& dy, const Rows& x, const Tensor& weight,
                       const lt::Block& block) {
  Tensor dw = at::empty(weight.sizes(), weight.options());
  const void* inputs = x.tensor.const_data_ptr();
  const int64_t stride = common_stride(dy);
  if (stride >= 0) {
    multiply(lt::grad_weight(block, dy[0].tensor.const_data_ptr(), dy[0].ld, stride, inputs, x.ld,
                             dw.mutable_data_ptr(), 0, narrow(block.groups)));
  } else {
    for (int64_t g = 0; g < block.groups; ++g) {
      multiply(lt::grad_weight(block, dy[g].tensor.const_data_ptr(), dy[g].ld, 0, inputs, x.ld,
                               dw.mutable_data_ptr(), g, 1));
    }
  }
  cuda::zero_outside(dw.mutable_data_ptr(), block.groups, block.total_out, block.total_in,
                     block.out, block.in, dw.element_size(), stream());
  C10_CUDA_CHECK(cudaGetLastError());
  return dw;
}

std::tuple<Tensor, Tensor, Tensor> sliced_linear_backward(at::TensorList dy, const Tensor& x,
                                                          const Tensor& weight, const Tensor& pre,
                                                          bool need_dx, bool need_dw,
                                                          bool need_db) {
  check_linear_backward(dy, x, weight, pre);
  const c10::cuda::CUDAGuard guard(x.device());
  const lt::Block block = block_of(x, weight, dy[0].size(-1));
  if (x.numel() == 0) {
    auto zeros = [&](bool needed, at::IntArrayRef shape) {
      return needed ? at::zeros(shape, x.options()) : none(x);
    };
    return {zeros(need_dx, x.sizes()), zeros(need_dw, weight.sizes()),
            zeros(need_db, {block.groups, block.total_out})};
  }
  std::vector<Rows> gradients;
  for (const Tensor& d : dy) gradients.push_back(rows_of(d));
  Tensor dx = none(x), dw = none(x), db = none(x);
  if (pre.numel() > 0 || need_db) db = backward_columns(gradients, pre, block, need_db);
  if (need_dx) {
    dx = at::empty(x.sizes(), x.options());
    for (int64_t g = 0; g < block.groups; ++g) {
      multiply(lt::grad_input(block, gradients[g].tensor.const_data_ptr(), gradients[g].ld,
                              weight.const_data_ptr(), g, dx.mutable_data_ptr()));
    }
  }
  if (need_dw) dw = backward_weight(gradients, rows_of(x), weight, block);
  return {dx, dw, db};
}

// ---------------------------------------------------------------------------------------- gates
std::tuple<Tensor, Tensor> gated_norm(const Tensor& x, const Tensor& mass, const Tensor& weight,
                                      const Tensor& bias, double eps) {
  check_norm(x, mass, weight, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(), m = mass.contiguous(), w = weight.contiguous(),
               b = bias.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor stats = at::empty({rows, 2}, x.options().dtype(at::kFloat));
  cuda::gated_norm(type_of(x), dense.const_data_ptr(), m.const_data_ptr<float>(),
                   w.const_data_ptr(), b.const_data_ptr(), y.mutable_data_ptr(),
                   stats.data_ptr<float>(), rows, narrow(cols), static_cast<float>(eps), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, stats};
}

std::tuple<Tensor, Tensor> gated_norm_backward(const Tensor& dy, const Tensor& x,
                                               const Tensor& mass, const Tensor& weight,
                                               const Tensor& bias, const Tensor& stats) {
  check_norm_backward(dy, x, mass, weight, bias, stats);
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  TORCH_CHECK_VALUE(cols <= cuda::kMaxNormWidth, "a norm of ", cols, " channels is too wide");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor upstream = dy.contiguous(), dense = x.contiguous(), m = mass.contiguous(),
               w = weight.contiguous(), b = bias.contiguous(), s = stats.contiguous();
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dmass = at::empty(mass.sizes(), mass.options());
  const Tensor partial = partial_sums(x, cuda::norm_blocks(rows) * cols);
  cuda::gated_norm_backward(
      type_of(x), upstream.const_data_ptr(), dense.const_data_ptr(), m.const_data_ptr<float>(),
      w.const_data_ptr(), b.const_data_ptr(), s.const_data_ptr<float>(), dx.mutable_data_ptr(),
      partial.data_ptr<float>(), dmass.data_ptr<float>(), rows, narrow(cols), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dmass};
}

Tensor gated_gelu(const Tensor& x, const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(), m = mass.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  Tensor y = at::empty(x.sizes(), x.options());
  cuda::gated_gelu(type_of(x), dense.const_data_ptr(), m.const_data_ptr<float>(),
                   y.mutable_data_ptr(), rows, narrow(cols), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> gated_gelu_backward(const Tensor& dy, const Tensor& x,
                                               const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  check_gradient("gated_gelu backward", dy, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor upstream = dy.contiguous(), dense = x.contiguous(), m = mass.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dmass = at::empty(mass.sizes(), mass.options());
  const Tensor partial = partial_sums(x, cuda::column_blocks(rows, cols) * cols);
  cuda::gated_gelu_backward(type_of(x), upstream.const_data_ptr(), dense.const_data_ptr(),
                            m.const_data_ptr<float>(), dx.mutable_data_ptr(),
                            partial.data_ptr<float>(), dmass.data_ptr<float>(), rows, narrow(cols),
                            stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dmass};
}

Tensor head_gate(const Tensor& x, const Tensor& mass) {
  check_heads(x, mass);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(), m = mass.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0, heads = mass.numel();
  Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  cuda::head_gate(type_of(x), dense.const_data_ptr(), m.const_data_ptr<float>(),
                  y.mutable_data_ptr(), rows, narrow(heads), narrow(cols / heads), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> head_gate_backward(const Tensor& dy, const Tensor& x,
                                              const Tensor& mass) {
  check_heads(x, mass);
  check_gradient("head_gate backward", dy, x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) {
    return {at::empty(x.sizes(), x.options()), at::zeros(mass.sizes(), mass.options())};
  }
  const Tensor upstream = dy.contiguous(), dense = x.contiguous(), m = mass.contiguous();
  const int64_t cols = x.size(-1), rows = x.numel() / cols, heads = mass.numel();
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dmass = at::empty(mass.sizes(), mass.options());
  const Tensor partial = partial_sums(x, cuda::column_blocks(rows, cols) * cols);
  cuda::head_gate_backward(type_of(x), upstream.const_data_ptr(), dense.const_data_ptr(),
                           m.const_data_ptr<float>(), dx.mutable_data_ptr(),
                           partial.data_ptr<float>(), dmass.data_ptr<float>(), rows, narrow(heads),
                           narrow(cols / heads), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dmass};
}

// ---------------------------------------------------------------------------------------- AdamW
void sliced_adamw(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& boxes, const Tensor& rates, double decay,
                  double beta1, double beta2, double eps) {
  check_adamw(param, grad, exp_avg, exp_avg_sq, boxes, rates);
  const c10::cuda::CUDAGuard guard(param.device());
  const Tensor box_rows = boxes.contiguous(), rate_rows = rates.contiguous();
  const auto* box = box_rows.const_data_ptr<int64_t>();   // on the host: offset, rows, cols, stride
  const auto* rate = rate_rows.const_data_ptr<double>();  // on the host: step_size, correction
  for (int64_t first = 0; first < boxes.size(0); first += cuda::kMaxBoxes) {
    cuda::AdamBatch batch{};
    batch.param = param.data_ptr<float>();
    batch.grad = grad.const_data_ptr<float>();
    batch.exp_avg = exp_avg.data_ptr<float>();
    batch.exp_avg_sq = exp_avg_sq.data_ptr<float>();
    batch.decay = static_cast<float>(decay);
    batch.beta1 = static_cast<float>(beta1);
    batch.beta2 = static_cast<float>(beta2);
    batch.eps = static_cast<float>(eps);
    for (int64_t n = first; n < boxes.size(0) && batch.count < cuda::kMaxBoxes; ++n) {
      cuda::AdamBox& b = batch.box[batch.count++];
      b.offset = box[4 * n];
      b.rows = narrow(box[4 * n + 1]);
      b.cols = narrow(box[4 * n + 2]);
      b.stride = box[4 * n + 3];
      b.step_size = static_cast<float>(rate[2 * n]);
      b.correction = static_cast<float>(rate[2 * n + 1]);
    }
    cuda::adamw(batch, stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace
}  // namespace vimnas

TORCH_LIBRARY_IMPL(vimnas_ds, CUDA, m) {
  m.impl("_sliced_linear", vimnas::sliced_linear);
  m.impl("_sliced_linear_backward", vimnas::sliced_linear_backward);
  m.impl("_gated_norm", vimnas::gated_norm);
  m.impl("_gated_norm_backward", vimnas::gated_norm_backward);
  m.impl("_gated_gelu", vimnas::gated_gelu);
  m.impl("_gated_gelu_backward", vimnas::gated_gelu_backward);
  m.impl("_head_gate", vimnas::head_gate);
  m.impl("_head_gate_backward", vimnas::head_gate_backward);
  m.impl("sliced_adamw_", vimnas::sliced_adamw);
}
