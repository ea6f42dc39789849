// y = x W[:o, :i]^T + b[:o] through the leading block of a whole weight: CPU, Meta and gradients.
//
// BLAS reads the block through its leading dimension, so no weight is copied; q, k and v, the
// groups of one layer, are multiplied in one parallel region (gemm.cpp). The gradient is one
// full-size tensor, because ZeRO-2 reduces whole parameters: the GEMM writes its block and only
// the strips around it are zeroed. GELU (tanh) joins the bias's pass in forward, and its
// derivative the bias gradient's pass in backward: both 12 bytes an element in float32.
//
// `sliced_mlp` is fc1, GELU and fc2 as one node: it keeps the pre-activations alone and computes
// GELU again in backward (8 bytes an element), which saves a quarter of a block's activations.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "gemm.h"
#include "row_blocks.h"

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

Tensor gelu_cpu(const Tensor& input) {
  const Tensor pre = input.contiguous();
  Tensor y = at::empty_like(pre);
  const int64_t cols = pre.size(-1);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, pre.scalar_type(), "gelu", [&] {
    // without a bias nothing is written to pre
    auto* const p = const_cast<scalar_t*>(pre.const_data_ptr<scalar_t>());
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    each_block(pre.numel() / std::max<int64_t>(1, cols), cols, [&](int64_t first, int64_t count) {
      rows::gelu(p + first * cols, nullptr, out + first * cols, count, cols);
    });
  });
  return y;
}

// The bias gradient's first dy.size(1) entries at `db` (or nowhere), and the gradient before GELU:
// dy gelu'(pre), or dy itself where pre is empty. dy and pre are (rows, cols) and contiguous.
Tensor bias_gradient(const Tensor& dy, const Tensor& pre, void* db) {
  const bool gelu = pre.numel() > 0;
  if (!gelu && db == nullptr) return dy;
  const int64_t rows = dy.size(0), cols = dy.size(1);
  Tensor dpre = gelu ? at::empty_like(dy) : dy;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dy.scalar_type(), "bias_gradient", [&] {
    using W = rows::Wide<scalar_t>;
    const scalar_t* const d = dy.const_data_ptr<scalar_t>();
    const scalar_t* const p = gelu ? pre.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* const out = gelu ? dpre.mutable_data_ptr<scalar_t>() : nullptr;
    std::vector<scalar_t> unwanted(db == nullptr ? cols : 0);
    scalar_t* const total = db == nullptr ? unwanted.data() : static_cast<scalar_t*>(db);
    sum_over_blocks<W>(rows, cols, total, [&](int64_t first, int64_t count, W* sums) {
      const int64_t at = first * cols;
      if (gelu) {
        rows::gelu_backward(d + at, p + at, out + at, sums, count, cols);
      } else {
        rows::column_sums(d + at, sums, count, cols);
      }
    });
  });
  return dpre;
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       int64_t out_features, bool gelu) {
  check_linear(x, weight, bias, out_features);
  const int64_t groups = weight.size(0), i = x.size(-1);
  const Tensor flat_x = x.reshape({-1, i}), none = at::empty({0}, x.options());
  Tensor y = at::empty(output_shape(x, groups, out_features), x.options());
  const Tensor flat = y.view({groups, flat_x.size(0), out_features});
  if (x.scalar_type() == at::kBFloat16) {  // the bias goes into the float32 accumulator
    for (int64_t g = 0; g < groups; ++g) {
      Tensor part = flat.select(0, g);
      at::addmm_out(part, bias.select(0, g).narrow(0, 0, out_features), flat_x,
                    block(weight, g, out_features, i).t());
    }
    return {gelu ? gelu_cpu(y) : y, gelu ? y : none};
  }
  const Tensor activated = gelu ? at::empty_like(y) : none;
  std::vector<Product> products;
  for (int64_t g = 0; g < groups; ++g) {
    products.push_back({flat.select(0, g), flat_x, block(weight, g, out_features, i).t(), 0});
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sliced_linear", [&] {
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    scalar_t* const h = gelu ? activated.mutable_data_ptr<scalar_t>() : nullptr;
    const scalar_t* const b = bias.const_data_ptr<scalar_t>();
    multiply(products, [&](int64_t first, int64_t count) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (g * flat_x.size(0) + first) * out_features;
        const scalar_t* const own = b + g * bias.size(1);
        if (gelu) {
          rows::gelu(out + at, own, h + at, count, out_features);
        } else {
          rows::add_bias(out + at, own, count, out_features);
        }
      }
    });
  });
  return {gelu ? activated : y, gelu ? y : none};
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        int64_t out_features, bool gelu) {
  std::vector<c10::SymInt> shape{weight.sym_size(0)};
  for (const auto& s : x.sym_sizes()) shape.push_back(s);
  shape.back() = out_features;
  Tensor y = at::empty_symint(shape, x.options());
  return {y, gelu ? at::empty_like(y) : at::empty({0}, x.options())};
}

// Zeros everywhere but in the leading (o, i) block of each (O, I) group.
void zero_around(const Tensor& dw, int64_t o, int64_t i) {
  const int64_t O = dw.size(1), I = dw.size(2), element = dw.element_size();
  auto* const data = static_cast<char*>(dw.mutable_data_ptr());
  at::parallel_for(0, dw.size(0) * O, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t kept = row % O < o ? i : 0;
      std::memset(data + (row * I + kept) * element, 0, (I - kept) * element);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(at::TensorList dy, const Tensor& x,
                                                const Tensor& weight, const Tensor& pre,
                                                bool need_dx, bool need_dw, bool need_db) {
  check_linear_backward(dy, x, weight, pre);
  const int64_t groups = weight.size(0), o = dy[0].size(-1), i = x.size(-1);
  const Tensor flat_x = x.reshape({-1, i}), none = at::empty({0}, x.options());
  Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : none;
  Tensor dw = need_dw ? at::empty(weight.sizes(), weight.options()) : none;
  Tensor db = need_db ? at::empty({groups, weight.size(1)}, weight.options()) : none;
  if (need_dw && (o < weight.size(1) || i < weight.size(2))) zero_around(dw, o, i);
  std::vector<Product> for_dx, for_dw;
  for (int64_t g = 0; g < groups; ++g) {
    char* sums = nullptr;
    if (need_db) {
      const int64_t size = db.element_size(), O = weight.size(1);
      sums = static_cast<char*>(db.mutable_data_ptr()) + g * O * size;
      std::memset(sums + o * size, 0, (O - o) * size);
    }
    const Tensor own = pre.numel() > 0 ? pre.select(0, g).reshape({-1, o}).contiguous() : none;
    const Tensor grad = bias_gradient(dy[g].reshape({-1, o}).contiguous(), own, sums);
    if (need_dx) for_dx.push_back({dx.view({-1, i}), grad, block(weight, g, o, i), g ? 1.0 : 0.0});
    if (need_dw) for_dw.push_back({block(dw, g, o, i), grad.t(), flat_x, 0});
  }
  if (need_dx) multiply(for_dx);
  if (need_dw) multiply_independent(for_dw);
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

template <class F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using ForwardOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                             int64_t, bool);
using BackwardOp = std::tuple<Tensor, Tensor, Tensor>(at::TensorList, const Tensor&, const Tensor&,
                                                      const Tensor&, bool, bool, bool);

std::tuple<Tensor, Tensor> call_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        int64_t out_features, bool gelu) {
  static auto op = find<ForwardOp>("vimnas_ds::_sliced_linear");
  return op.call(x, weight, bias, out_features, gelu);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(at::TensorList dy, const Tensor& x,
                                                 const Tensor& weight, const Tensor& pre,
                                                 bool need_dx, bool need_dw, bool need_db) {
  static auto op = find<BackwardOp>("vimnas_ds::_sliced_linear_backward");
  return op.call(dy, x, weight, pre, need_dx, need_dw, need_db);
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
    check_single_backward("sliced_linear");
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &pre = saved[2];
    const bool dx = ctx->needs_input_grad(0), dw = ctx->needs_input_grad(1),
               db = ctx->needs_input_grad(2);
    auto [gx, gw, gb] = call_backward(grads, x, weight, pre, dx, dw, db);
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

Tensor mlp_forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                   const Tensor& b2, int64_t hidden, int64_t out_features, Tensor& pre) {
  TORCH_CHECK_VALUE(w1.dim() == 3 && w1.size(0) == 1 && w2.dim() == 3 && w2.size(0) == 1,
                    "sliced_mlp: weights must be (1, O, I), got ", w1.sizes(), " and ",
                    w2.sizes());
  auto [h, before] = call_forward(x, w1, b1, hidden, true);
  pre = before;
  return std::get<0>(call_forward(h.select(0, 0), w2, b2, out_features, false)).select(0, 0);
}

struct SlicedMlp : torch::autograd::Function<SlicedMlp> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w1, const Tensor& b1,
                        const Tensor& w2, const Tensor& b2, int64_t hidden,
                        int64_t out_features) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor pre;
    Tensor y = mlp_forward(x, w1, b1, w2, b2, hidden, out_features, pre);
    ctx->save_for_backward({x, w1, w2, pre});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_single_backward("sliced_mlp");
    static auto gelu = find<Tensor(const Tensor&)>("vimnas_ds::_gelu");
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w1 = saved[1], &w2 = saved[2], &pre = saved[3];
    const auto need = [&](size_t k) { return ctx->needs_input_grad(k); };
    const bool first = need(0) || need(1) || need(2);
    const Tensor none = at::empty({0}, x.options());
    auto [dh, dw2, db2] = call_backward(grads, gelu.call(pre).select(0, 0), w2, none, first,
                                        need(3), need(4));
    Tensor dx, dw1, db1;
    if (first) {
      std::tie(dx, dw1, db1) = call_backward(dh, x, w1, pre, need(0), need(1), need(2));
    }
    const auto given = [&](size_t k, const Tensor& t) { return need(k) ? t : Tensor(); };
    return {given(0, dx),  given(1, dw1), given(2, db1), given(3, dw2),
            given(4, db2), Tensor(),      Tensor()};
  }
};

Tensor mlp(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
           int64_t hidden, int64_t out_features) {
  return SlicedMlp::apply(x, w1, b1, w2, b2, hidden, out_features);
}

Tensor mlp_plain(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                 const Tensor& b2, int64_t hidden, int64_t out_features) {
  Tensor pre;
  return mlp_forward(x, w1, b1, w2, b2, hidden, out_features, pre);
}

Tensor gelu_any(const Tensor& pre) { return at::gelu(pre.contiguous(), "tanh"); }

}  // namespace

TORCH_LIBRARY_IMPL(vimnas_ds, CPU, m) {
  m.impl("_gelu", gelu_cpu);
  m.impl("_sliced_linear", forward_cpu);
  m.impl("_sliced_linear_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Meta, m) {
  m.impl("_sliced_linear", forward_meta);
  m.impl("_sliced_linear_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(vimnas_ds, Autograd, m) {
  m.impl("sliced_linear", autograd);
  m.impl("sliced_mlp", mlp);
}
TORCH_LIBRARY_IMPL(vimnas_ds, CompositeExplicitAutograd, m) {
  m.impl("_gelu", gelu_any);
  m.impl("sliced_linear", plain);
  m.impl("sliced_mlp", mlp_plain);
}

}  // namespace vimnas
