// Input checks shared by all backends: each says what is wrong, with names, shapes and values.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace vimnas {

// The gradients' own gradients are not written: PyTorch's fallback would return zeros in silence.
inline void check_single_backward(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), op,
                              " has no double backward (create_graph=True)");
}

inline void check_float(const char* op, const at::Tensor& x) {
  const auto t = x.scalar_type();
  TORCH_CHECK_TYPE(t == at::kFloat || t == at::kBFloat16 || (t == at::kDouble && !x.is_cuda()), op,
                   ": float32 and bfloat16 are supported (float64 on CPU), x is ", t);
}

// Masses and statistics stay in float32 under bfloat16 activations.
inline at::ScalarType wide(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         int64_t out_features) {
  check_float("sliced_linear", x);
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.is_contiguous(),
                    "sliced_linear: weight must be a contiguous (G, O, I), got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.size(0) > 0, "sliced_linear: weight ", weight.sizes(), " has no group");
  TORCH_CHECK_VALUE(bias.dim() == 2 && bias.is_contiguous() && bias.size(0) == weight.size(0) &&
                        bias.size(1) == weight.size(1),
                    "sliced_linear: bias ", bias.sizes(), " does not fit weight ", weight.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1, "sliced_linear: x must have at least one axis");
  TORCH_CHECK_VALUE(x.size(-1) > 0 && x.size(-1) <= weight.size(2) && out_features > 0 &&
                        out_features <= weight.size(1),
                    "sliced_linear: block (", out_features, ", ", x.size(-1),
                    ") does not fit a weight of (", weight.size(1), ", ", weight.size(2), ")");
  TORCH_CHECK_VALUE(
      x.scalar_type() == weight.scalar_type() && x.scalar_type() == bias.scalar_type(),
      "sliced_linear: one dtype is needed, x is ", x.scalar_type(), ", weight ",
      weight.scalar_type(), ", bias ", bias.scalar_type());
  TORCH_CHECK_VALUE(x.device() == weight.device() && x.device() == bias.device(),
                    "sliced_linear: one device is needed, x is on ", x.device(), ", weight on ",
                    weight.device(), ", bias on ", bias.device());
}

inline void check_linear_backward(at::TensorList dy, const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& pre) {
  TORCH_CHECK_VALUE(weight.dim() == 3 && !dy.empty() &&
                        static_cast<int64_t>(dy.size()) == weight.size(0),
                    "sliced_linear backward: ", dy.size(), " gradients for weight ",
                    weight.sizes());
  for (const at::Tensor& g : dy) {
    TORCH_CHECK_VALUE(g.dim() == x.dim() && g.sizes() == dy[0].sizes() &&
                          g.sizes().slice(0, g.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                      "sliced_linear backward: gradient ", g.sizes(), " does not fit x ",
                      x.sizes());
    TORCH_CHECK_VALUE(g.scalar_type() == x.scalar_type(), "sliced_linear backward: gradient is ",
                      g.scalar_type(), ", x is ", x.scalar_type());
  }
  TORCH_CHECK_VALUE(dy[0].size(-1) <= weight.size(1) && x.size(-1) <= weight.size(2),
                    "sliced_linear backward: block (", dy[0].size(-1), ", ", x.size(-1),
                    ") does not fit weight ", weight.sizes());
  TORCH_CHECK_VALUE(
      pre.numel() == 0 || pre.numel() == dy[0].numel() * static_cast<int64_t>(dy.size()),
      "sliced_linear backward: pre-activation ", pre.sizes(), " does not fit gradients ",
      dy[0].sizes());
}

inline void check_mass(const char* op, const at::Tensor& x, const at::Tensor& mass) {
  check_float(op, x);
  TORCH_CHECK_VALUE(mass.dim() == 1 && mass.is_contiguous(), op,
                    ": mass must be a contiguous vector, got ", mass.sizes());
  TORCH_CHECK_VALUE(mass.scalar_type() == wide(x), op, ": mass must be ", wide(x), " for x of ",
                    x.scalar_type(), ", got ", mass.scalar_type());
  TORCH_CHECK_VALUE(mass.device() == x.device(), op, ": x is on ", x.device(), ", mass on ",
                    mass.device());
}

// The kernels read dy by x's shape and dtype.
inline void check_gradient(const char* op, const at::Tensor& dy, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
      op, ": gradient ", dy.toString(), " ", dy.sizes(), " does not fit x ", x.toString(), " ",
      x.sizes());
}

inline void check_gate(const char* op, const at::Tensor& x, const at::Tensor& mass) {
  check_mass(op, x, mass);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == mass.size(0), op, ": mass of ", mass.size(0),
                    " channels for x ", x.sizes());
}

inline void check_heads(const at::Tensor& x, const at::Tensor& mass) {
  check_mass("head_gate", x, mass);
  TORCH_CHECK_VALUE(x.dim() >= 1 && mass.size(0) > 0 && x.size(-1) % mass.size(0) == 0,
                    "head_gate: ", mass.size(0), " heads do not divide x ", x.sizes());
}

inline void check_norm(const at::Tensor& x, const at::Tensor& mass, const at::Tensor& weight,
                       const at::Tensor& bias) {
  check_gate("gated_norm", x, mass);
  for (const at::Tensor& p : {weight, bias}) {
    TORCH_CHECK_VALUE(p.dim() == 1 && p.size(0) == x.size(-1) && p.is_contiguous() &&
                          p.scalar_type() == x.scalar_type(),
                      "gated_norm: weight and bias must be ", x.scalar_type(), " vectors of ",
                      x.size(-1), " channels, got ", p.scalar_type(), " ", p.sizes());
  }
}

inline void check_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mass,
                                const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& stats) {
  check_norm(x, mass, weight, bias);
  check_gradient("gated_norm backward", dy, x);
  const int64_t rows = x.size(-1) > 0 ? x.numel() / x.size(-1) : 0;
  TORCH_CHECK_VALUE(stats.numel() == 2 * rows && stats.scalar_type() == wide(x) &&
                        stats.device() == x.device(),
                    "gated_norm backward: statistics ", stats.toString(), " ", stats.sizes(),
                    " do not fit ", rows, " rows");
}

inline void check_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                        const at::Tensor& exp_avg_sq, const at::Tensor& boxes,
                        const at::Tensor& rates) {
  for (const at::Tensor& t : {param, grad, exp_avg, exp_avg_sq}) {
    TORCH_CHECK_VALUE(
        t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == param.numel() &&
            t.device() == param.device(),
        "sliced_adamw_: weights, gradient and moments must be contiguous float32 of one size on "
        "one device; weights are ",
        param.sizes(), " on ", param.device(), ", one of the others is ", t.scalar_type(), " ",
        t.sizes(), " on ", t.device());
  }
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.is_cpu() &&
                        boxes.is_contiguous() && boxes.scalar_type() == at::kLong,
                    "sliced_adamw_: boxes must be (N, 4) int64 on the CPU (offset, rows, columns, "
                    "row stride), got ",
                    boxes.scalar_type(), " ", boxes.sizes());
  TORCH_CHECK_VALUE(rates.dim() == 2 && rates.size(0) == boxes.size(0) && rates.size(1) == 2 &&
                        rates.is_cpu() && rates.is_contiguous() &&
                        rates.scalar_type() == at::kDouble,
                    "sliced_adamw_: rates must be (N, 2) float64 on the CPU for ", boxes.size(0),
                    " boxes, got ", rates.scalar_type(), " ", rates.sizes());
  const int64_t* b = boxes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < boxes.size(0); ++i, b += 4) {
    TORCH_CHECK_VALUE(b[0] >= 0 && b[1] > 0 && b[2] > 0 && b[3] >= b[2] &&
                          b[0] + (b[1] - 1) * b[3] + b[2] <= param.numel(),
                      "sliced_adamw_: box ", i, " (offset ", b[0], ", ", b[1], " rows of ", b[2],
                      ", stride ", b[3], ") is outside ", param.numel(), " elements");
  }
}

}  // namespace vimnas
