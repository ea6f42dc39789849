// Gates of the alpha step: soft choices as masses on channels (METHOD.md section 3). CPU, Meta and
// gradients; weights are constants. Masses and their gradients are float32 under bfloat16.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"

namespace vimnas {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor as_rows(const Tensor& x) { return x.reshape({-1, x.size(-1)}).to(wide(x)); }

std::tuple<Tensor, Tensor> norm_cpu(const Tensor& x, const Tensor& mass, const Tensor& weight,
                                    const Tensor& bias, double eps) {
  check_norm(x, mass, weight, bias);
  const Tensor rows = as_rows(x), share = mass / mass.sum();
  const Tensor mean = at::mv(rows, share);
  Tensor y = rows - mean.unsqueeze(1);
  const Tensor rstd = (at::mv(y.square(), share) + eps).rsqrt();
  y.mul_(rstd.unsqueeze(1)).mul_(weight.to(wide(x)) * mass).add_(bias.to(wide(x)) * mass);
  return {y.to(x.scalar_type()).view(x.sizes()), at::stack({mean, rstd}, 1)};
}

std::tuple<Tensor, Tensor> norm_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& mass,
                                             const Tensor& weight, const Tensor& bias,
                                             const Tensor& stats) {
  check_norm(x, mass, weight, bias);
  const Tensor rows = as_rows(x), grad = as_rows(dy), w = weight.to(wide(x));
  const Tensor total = mass.sum(), share = mass / total;
  const Tensor mean = stats.select(1, 0).unsqueeze(1), rstd = stats.select(1, 1).unsqueeze(1);
  const Tensor h = (rows - mean) * rstd;
  const Tensor a = grad * (mass * w) * rstd;
  const Tensor first = a.sum(1, true), second = (a * h).sum(1, true);  // A, B of the row
  const Tensor dx = a - share * (first + h * second);
  // through y, and through the shares in mean and variance (their common scale cancels)
  const Tensor spread = at::mv(h.square(), share).unsqueeze(1);
  const Tensor through = (first * h + 0.5 * second * (h.square() - spread)) / rstd;
  const Tensor dmass =
      (grad * (h * w + bias.to(wide(x)))).sum(0) - through.sum(0) / total;
  return {dx.to(x.scalar_type()).view(x.sizes()), dmass};
}

Tensor gelu_cpu(const Tensor& x, const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  return (at::gelu(x, "tanh") * mass).to(x.scalar_type());
}

std::tuple<Tensor, Tensor> gelu_backward_cpu(const Tensor& dy, const Tensor& x,
                                             const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  const Tensor grad = as_rows(dy), rows = as_rows(x);
  const Tensor dmass = (grad * at::gelu(rows, "tanh")).sum(0);
  const Tensor dx = at::gelu_backward(grad * mass, rows, "tanh");
  return {dx.to(x.scalar_type()).view(x.sizes()), dmass};
}

Tensor heads_cpu(const Tensor& x, const Tensor& mass) {
  check_heads(x, mass);
  const int64_t width = x.size(-1) / mass.size(0);
  return (x * mass.repeat_interleave(width)).to(x.scalar_type());
}

std::tuple<Tensor, Tensor> heads_backward_cpu(const Tensor& dy, const Tensor& x,
                                              const Tensor& mass) {
  check_heads(x, mass);
  const Tensor grad = as_rows(dy);
  const Tensor dmass = (grad * as_rows(x)).sum(0).view({mass.size(0), -1}).sum(1);
  return {heads_cpu(dy, mass).contiguous(), dmass};
}

Tensor like(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

std::tuple<Tensor, Tensor> norm_meta(const Tensor& x, const Tensor& mass, const Tensor&,
                                     const Tensor&, double) {
  c10::SymInt rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows = rows * x.sym_size(d);
  return {like(x), at::empty_symint({rows, 2}, mass.options())};
}

std::tuple<Tensor, Tensor> norm_backward_meta(const Tensor&, const Tensor& x, const Tensor& mass,
                                              const Tensor&, const Tensor&, const Tensor&) {
  return {like(x), like(mass)};
}

Tensor gate_meta(const Tensor& x, const Tensor&) { return like(x); }

std::tuple<Tensor, Tensor> gate_backward_meta(const Tensor&, const Tensor& x, const Tensor& mass) {
  return {like(x), like(mass)};
}

template <class F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using Pair = std::tuple<Tensor, Tensor>;
using NormOp = Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
using NormBackwardOp = Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&);
using GateOp = Tensor(const Tensor&, const Tensor&);
using GateBackwardOp = Pair(const Tensor&, const Tensor&, const Tensor&);

struct GatedNorm : torch::autograd::Function<GatedNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& mass,
                        const Tensor& weight, const Tensor& bias, double eps) {
    static auto op = find<NormOp>("vimnas_ds::_gated_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats] = op.call(x, mass, weight, bias, eps);
    ctx->save_for_backward({x, mass, weight, bias, stats});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static auto op = find<NormBackwardOp>("vimnas_ds::_gated_norm_backward");
    const auto s = ctx->get_saved_variables();
    auto [dx, dmass] = op.call(dy[0].contiguous(), s[0], s[1], s[2], s[3], s[4]);
    return {dx, dmass, Tensor(), Tensor(), Tensor()};
  }
};

template <bool kHeads>
struct Gate : torch::autograd::Function<Gate<kHeads>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& mass) {
    static auto op = find<GateOp>(kHeads ? "vimnas_ds::_head_gate" : "vimnas_ds::_gated_gelu");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, mass});
    return op.call(x, mass);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static auto op = find<GateBackwardOp>(kHeads ? "vimnas_ds::_head_gate_backward"
                                                 : "vimnas_ds::_gated_gelu_backward");
    const auto s = ctx->get_saved_variables();
    auto [dx, dmass] = op.call(dy[0].contiguous(), s[0], s[1]);
    return {dx, dmass};
  }
};

Tensor norm(const Tensor& x, const Tensor& mass, const Tensor& w, const Tensor& b, double eps) {
  return GatedNorm::apply(x, mass, w, b, eps);
}
Tensor norm_plain(const Tensor& x, const Tensor& mass, const Tensor& w, const Tensor& b,
                  double eps) {
  static auto op = find<NormOp>("vimnas_ds::_gated_norm");
  return std::get<0>(op.call(x, mass, w, b, eps));
}
template <bool kHeads>
Tensor gate(const Tensor& x, const Tensor& mass) {
  return Gate<kHeads>::apply(x, mass);
}
template <bool kHeads>
Tensor gate_plain(const Tensor& x, const Tensor& mass) {
  static auto op = find<GateOp>(kHeads ? "vimnas_ds::_head_gate" : "vimnas_ds::_gated_gelu");
  return op.call(x, mass);
}

}  // namespace

TORCH_LIBRARY_IMPL(vimnas_ds, CPU, m) {
  m.impl("_gated_norm", norm_cpu);
  m.impl("_gated_norm_backward", norm_backward_cpu);
  m.impl("_gated_gelu", gelu_cpu);
  m.impl("_gated_gelu_backward", gelu_backward_cpu);
  m.impl("_head_gate", heads_cpu);
  m.impl("_head_gate_backward", heads_backward_cpu);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Meta, m) {
  m.impl("_gated_norm", norm_meta);
  m.impl("_gated_norm_backward", norm_backward_meta);
  m.impl("_gated_gelu", gate_meta);
  m.impl("_gated_gelu_backward", gate_backward_meta);
  m.impl("_head_gate", gate_meta);
  m.impl("_head_gate_backward", gate_backward_meta);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Autograd, m) {
  m.impl("gated_norm", norm);
  m.impl("gated_gelu", gate<false>);
  m.impl("head_gate", gate<true>);
}
TORCH_LIBRARY_IMPL(vimnas_ds, CompositeExplicitAutograd, m) {
  m.impl("gated_norm", norm_plain);
  m.impl("gated_gelu", gate_plain<false>);
  m.impl("head_gate", gate_plain<true>);
}

}  // namespace vimnas
