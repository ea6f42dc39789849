// y = x W[:o, :i]^T + b[:o] through the leading block of a whole weight: CPU, Meta and gradients.
//
// BLAS reads the block through its leading dimension, so no weight is copied. The gradient is one
// full-size tensor, because ZeRO-2 reduces whole parameters: the GEMM writes its block and only
// the strips around it are zeroed. GELU (tanh) joins the bias's pass in forward, and its
// derivative the bias gradient's pass in backward: 8 and 12 bytes an element in float32.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"

namespace vimnas {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::vector<int64_t> output_shape(const Tensor& x, int64_t groups, int64_t out_features) {
  std::vector<int64_t> shape{groups};
  shape.insert(shape.end(), x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  return shape;
}

Tensor block(const Tensor& weight, int64_t group, int64_t o, int64_t i) {
  return weight.select(0, group).narrow(0, 0, o).narrow(1, 0, i);
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       int64_t out_features, bool gelu) {
  check_linear(x, weight, bias, out_features);
  const int64_t groups = weight.size(0), i = x.size(-1);
  const Tensor rows = x.reshape({-1, i});
  Tensor y = at::empty(output_shape(x, groups, out_features), x.options());
  const Tensor flat = y.view({groups, rows.size(0), out_features});
  for (int64_t g = 0; g < groups; ++g) {
    Tensor part = flat.select(0, g);
    at::addmm_out(part, bias.select(0, g).narrow(0, 0, out_features), rows,
                  block(weight, g, out_features, i).t());
  }
  if (!gelu) return {y, at::empty({0}, x.options())};
  return {at::gelu(y, "tanh"), y};
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        int64_t out_features, bool gelu) {
  std::vector<c10::SymInt> shape{weight.sym_size(0)};
  for (const auto& s : x.sym_sizes()) shape.push_back(s);
  shape.back() = out_features;
  Tensor y = at::empty_symint(shape, x.options());
  return {y, gelu ? at::empty_like(y) : at::empty({0}, x.options())};
}

// Zeros everywhere but in the leading (o, i) block of each group.
void zero_around(Tensor& dw, int64_t o, int64_t i) {
  const int64_t O = dw.size(1), I = dw.size(2);
  if (o < O) dw.narrow(1, o, O - o).zero_();
  if (i < I) dw.narrow(1, 0, o).narrow(2, i, I - i).zero_();
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(at::TensorList dy, const Tensor& x,
                                                const Tensor& weight, const Tensor& pre,
                                                bool need_dx, bool need_dw, bool need_db) {
  check_linear_backward(dy, x, weight, pre);
  const int64_t groups = weight.size(0), o = dy[0].size(-1), i = x.size(-1);
  const Tensor rows = x.reshape({-1, i}), none = at::empty({0}, x.options());
  Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : none;
  Tensor dw = need_dw ? at::empty(weight.sizes(), weight.options()) : none;
  Tensor db = need_db ? at::empty({groups, weight.size(1)}, weight.options()) : none;
  if (need_dw) zero_around(dw, o, i);
  if (need_db && o < weight.size(1)) db.narrow(1, o, weight.size(1) - o).zero_();
  for (int64_t g = 0; g < groups; ++g) {
    Tensor grad = dy[g].reshape({-1, o});
    Tensor sum = need_db ? db.select(0, g).narrow(0, 0, o) : none;
    if (pre.numel() > 0) {
      grad = at::gelu_backward(grad, pre.select(0, g).reshape({-1, o}), "tanh");
    }
    if (need_dx) {
      Tensor flat = dx.view({-1, i});
      if (g == 0) {
        at::mm_out(flat, grad, block(weight, g, o, i));
      } else {
        flat.addmm_(grad, block(weight, g, o, i));
      }
    }
    if (need_dw) block(dw, g, o, i).addmm_(grad.t(), rows, /*beta=*/0);
    if (need_db) at::sum_out(sum, grad, 0);
  }
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(at::TensorList dy, const Tensor& x,
                                                 const Tensor& weight, const Tensor& pre,
                                                 bool need_dx, bool need_dw, bool need_db) {
  const Tensor none = at::empty({0}, x.options());
  return {need_dx ? at::empty_symint(x.sym_sizes(), x.options()) : none,
          need_dw ? at::empty_symint(weight.sym_sizes(), weight.options()) : none,
          need_db ? at::empty_symint({weight.sym_size(0), weight.sym_size(1)}, weight.options())
                  : none};
}

using ForwardOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                             int64_t, bool);
using BackwardOp = std::tuple<Tensor, Tensor, Tensor>(at::TensorList, const Tensor&, const Tensor&,
                                                      const Tensor&, bool, bool, bool);

std::tuple<Tensor, Tensor> call_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        int64_t out_features, bool gelu) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("vimnas_ds::_sliced_linear", "")
                       .typed<ForwardOp>();
  return op.call(x, weight, bias, out_features, gelu);
}

struct SlicedLinear : torch::autograd::Function<SlicedLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, int64_t out_features, bool gelu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, pre] = call_forward(x, weight, bias, out_features, gelu);
    ctx->save_for_backward({x, weight, pre});
    return y.unbind(0);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("vimnas_ds::_sliced_linear_backward", "")
                         .typed<BackwardOp>();
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &pre = saved[2];
    const bool dx = ctx->needs_input_grad(0), dw = ctx->needs_input_grad(1),
               db = ctx->needs_input_grad(2);
    auto [gx, gw, gb] = op.call(grads, x, weight, pre, dx, dw, db);
    return {dx ? gx : Tensor(), dw ? gw : Tensor(), db ? gb : Tensor(), Tensor(), Tensor()};
  }
};

variable_list autograd(const Tensor& x, const Tensor& weight, const Tensor& bias,
                       int64_t out_features, bool gelu) {
  return SlicedLinear::apply(x, weight, bias, out_features, gelu);
}

variable_list plain(const Tensor& x, const Tensor& weight, const Tensor& bias,
                    int64_t out_features, bool gelu) {
  return std::get<0>(call_forward(x, weight, bias, out_features, gelu)).unbind(0);
}

}  // namespace

TORCH_LIBRARY_IMPL(vimnas_ds, CPU, m) {
  m.impl("_sliced_linear", forward_cpu);
  m.impl("_sliced_linear_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Meta, m) {
  m.impl("_sliced_linear", forward_meta);
  m.impl("_sliced_linear_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Autograd, m) { m.impl("sliced_linear", autograd); }
TORCH_LIBRARY_IMPL(vimnas_ds, CompositeExplicitAutograd, m) { m.impl("sliced_linear", plain); }

}  // namespace vimnas
