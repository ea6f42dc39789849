// Gates of the alpha step: soft choices as masses on channels (METHOD.md section 3). CPU, Meta and
// gradients; weights are constants. Masses and their gradients are float32 under bfloat16. Forward
// and backward read and write the activations once each; a mass's gradient is a sum over blocks of
// rows.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "row_blocks.h"

namespace vimnas {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// f(scalar_t{}, rows, cols) with x's element type and its form as rows.
template <class F>
void over_rows(const Tensor& x, const F& f) {
  const int64_t cols = x.size(-1);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "gate",
                                 [&] { f(scalar_t{}, x.numel() / std::max<int64_t>(1, cols), cols); });
}

// The masses and weights of a gated norm in the statistics' type, alive as long as this is.
template <class W>
struct NormArguments {
  NormArguments(const Tensor& mass, const Tensor& weight, const Tensor& bias, double eps)
      : sum(mass.sum()), share(mass / sum), w(weight.to(mass)), b(bias.to(mass)) {
    n = {share.const_data_ptr<W>(), w.template const_data_ptr<W>(), b.template const_data_ptr<W>(),
         mass.const_data_ptr<W>(), W(eps), sum.item<W>()};
  }
  Tensor sum, share, w, b;
  rows::Norm<W> n;
};

std::tuple<Tensor, Tensor> norm_cpu(const Tensor& input, const Tensor& mass, const Tensor& weight,
                                    const Tensor& bias, double eps) {
  check_norm(input, mass, weight, bias);
  const Tensor x = input.contiguous();
  Tensor y = at::empty_like(x), stats;
  over_rows(x, [&](auto type, int64_t rows, int64_t cols) {
    using T = decltype(type);
    using W = rows::Wide<T>;
    const NormArguments<W> given(mass, weight, bias, eps);
    stats = at::empty({rows, 2}, mass.options());
    const T* in = x.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    W* statistics = stats.mutable_data_ptr<W>();
    each_block(rows, cols, [&](int64_t first, int64_t count) {
      rows::norm(in + first * cols, given.n, out + first * cols, statistics + 2 * first, count,
                 cols);
    });
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor> norm_backward_cpu(const Tensor& dy, const Tensor& input,
                                             const Tensor& mass, const Tensor& weight,
                                             const Tensor& bias, const Tensor& given_stats) {
  check_norm_backward(dy, input, mass, weight, bias, given_stats);
  const Tensor x = input.contiguous(), grad = dy.contiguous(), stats = given_stats.contiguous();
  Tensor dx = at::empty_like(x), dmass;
  over_rows(x, [&](auto type, int64_t rows, int64_t cols) {
    using T = decltype(type);
    using W = rows::Wide<T>;
    const NormArguments<W> given(mass, weight, bias, /*eps=*/0);
    const T *d = grad.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    const W* statistics = stats.const_data_ptr<W>();
    T* out = dx.mutable_data_ptr<T>();
    dmass = at::empty({cols}, mass.options());
    W* const total = dmass.mutable_data_ptr<W>();
    sum_over_blocks<W>(rows, cols, total, [&](int64_t first, int64_t count, W* sums) {
      const int64_t at = first * cols;
      rows::norm_backward(d + at, in + at, given.n, statistics + 2 * first, out + at, sums, count,
                          cols);
    });
  });
  return {dx, dmass};
}

// GELU of x, or x itself, times the mass of each channel; mass (D,).
template <bool kGelu>
Tensor gate_pass(const Tensor& input, const Tensor& mass) {
  const Tensor x = input.contiguous();
  Tensor y = at::empty_like(x);
  over_rows(x, [&](auto type, int64_t rows, int64_t cols) {
    using T = decltype(type);
    const T* in = x.const_data_ptr<T>();
    const auto* m = mass.const_data_ptr<rows::Wide<T>>();
    T* out = y.mutable_data_ptr<T>();
    each_block(rows, cols, [&](int64_t first, int64_t count) {
      const int64_t at = first * cols;
      if constexpr (kGelu) {
        rows::gated_gelu(in + at, m, out + at, count, cols);
      } else {
        rows::scale(in + at, m, out + at, count, cols);
      }
    });
  });
  return y;
}

template <bool kGelu>
std::tuple<Tensor, Tensor> gate_backward_pass(const Tensor& dy, const Tensor& input,
                                              const Tensor& mass) {
  const Tensor x = input.contiguous(), grad = dy.contiguous();
  Tensor dx = at::empty_like(x), dmass;
  over_rows(x, [&](auto type, int64_t rows, int64_t cols) {
    using T = decltype(type);
    using W = rows::Wide<T>;
    const T *d = grad.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    const W* m = mass.const_data_ptr<W>();
    T* out = dx.mutable_data_ptr<T>();
    dmass = at::empty({cols}, mass.options());
    W* const total = dmass.mutable_data_ptr<W>();
    sum_over_blocks<W>(rows, cols, total, [&](int64_t first, int64_t count, W* sums) {
      const int64_t at = first * cols;
      if constexpr (kGelu) {
        rows::gated_gelu_backward(d + at, in + at, m, out + at, sums, count, cols);
      } else {
        rows::scale_backward(d + at, in + at, m, out + at, sums, count, cols);
      }
    });
  });
  return {dx, dmass};
}

Tensor gelu_cpu(const Tensor& x, const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  return gate_pass<true>(x, mass);
}

std::tuple<Tensor, Tensor> gelu_backward_cpu(const Tensor& dy, const Tensor& x,
                                             const Tensor& mass) {
  check_gate("gated_gelu", x, mass);
  check_gradient("gated_gelu", dy, x);
  return gate_backward_pass<true>(dy, x, mass);
}

Tensor per_channel(const Tensor& x, const Tensor& mass) {
  return mass.repeat_interleave(x.size(-1) / mass.size(0));
}

Tensor heads_cpu(const Tensor& x, const Tensor& mass) {
  check_heads(x, mass);
  return gate_pass<false>(x, per_channel(x, mass));
}

std::tuple<Tensor, Tensor> heads_backward_cpu(const Tensor& dy, const Tensor& x,
                                              const Tensor& mass) {
  check_heads(x, mass);
  check_gradient("head_gate", dy, x);
  auto [dx, sums] = gate_backward_pass<false>(dy, x, per_channel(x, mass));
  return {dx, sums.view({mass.size(0), -1}).sum(1)};
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
    check_single_backward("gated_norm");
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
    check_single_backward(kHeads ? "head_gate" : "gated_gelu");
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
