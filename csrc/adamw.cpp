// One pass of AdamW over rectangles of a flat float32 partition; everything else keeps its bits.
//
// 28 bytes move per active element (weights and moments read and written, the gradient read). Rows
// of a rectangle are short streams, so the heads of the next row's four streams are prefetched
// while the current row runs out. What remains of a gap's cost is the hardware's own prefetching,
// which runs on past a row's end: with rows of 528 elements and gaps of 112 an element takes 1.4
// times as long as without gaps.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "clones.h"

namespace vimnas {
namespace {

using at::Tensor;

struct Rates {
  float decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inverse_correction;
};

VIMNAS_CLONES void update_row(float* __restrict__ w, const float* __restrict__ g,
                              float* __restrict__ m, float* __restrict__ v, int64_t n, Rates r) {
  for (int64_t k = 0; k < n; ++k) {
    const float grad = g[k];
    const float first = m[k] + r.one_minus_beta1 * (grad - m[k]);
    const float second = r.beta2 * v[k] + r.one_minus_beta2 * grad * grad;
    const float denominator = __builtin_sqrtf(second) * r.inverse_correction + r.eps;
    w[k] = w[k] * r.decay - r.step_size * (first / denominator);
    m[k] = first;
    v[k] = second;
  }
}

constexpr int64_t kAhead = 256;  // elements of the next row to prefetch, per stream

void prefetch(const float* p, int64_t n) {
  for (int64_t k = 0; k < n; k += 16) __builtin_prefetch(p + k, 1, 2);
}

void adamw_cpu(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
               const Tensor& exp_avg_sq, const Tensor& boxes, const Tensor& rates, double decay,
               double beta1, double beta2, double eps) {
  check_adamw(param, grad, exp_avg, exp_avg_sq, boxes, rates);
  float *w = param.mutable_data_ptr<float>(), *m = exp_avg.mutable_data_ptr<float>(),
        *v = exp_avg_sq.mutable_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  const int64_t count = boxes.size(0);
  const int64_t* box = boxes.const_data_ptr<int64_t>();
  const double* rate = rates.const_data_ptr<double>();
  std::vector<int64_t> start(count + 1, 0);  // elements before each box
  for (int64_t b = 0; b < count; ++b) start[b + 1] = start[b] + box[4 * b + 1] * box[4 * b + 2];
  // threads share elements, not boxes: a large rectangle is cut between rows or within one
  at::parallel_for(0, start[count], 16384, [&](int64_t begin, int64_t end) {
    int64_t b = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; b < count && start[b] < end; ++b) {
      const int64_t *shape = box + 4 * b, cols = shape[2], stride = shape[3];
      const Rates r{float(decay),      float(1 - beta1), float(beta2),
                    float(1 - beta2),  float(eps),       float(rate[2 * b]),
                    float(1 / rate[2 * b + 1])};
      const int64_t first = std::max(begin, start[b]) - start[b];
      const int64_t last = std::min(end, start[b + 1]) - start[b];
      for (int64_t at = first; at < last;) {
        const int64_t row = at / cols, col = at % cols, n = std::min(cols - col, last - at);
        const int64_t offset = shape[0] + row * stride + col, next = offset - col + stride;
        const int64_t ahead = at + n < last ? std::min(kAhead, last - at - n) : 0;
        const int64_t body = ahead > 0 && stride > cols ? std::max<int64_t>(0, n - kAhead) : n;
        if (body > 0) update_row(w + offset, g + offset, m + offset, v + offset, body, r);
        if (body < n) {
          const int64_t length = std::min(ahead, cols), rest = offset + body;
          prefetch(w + next, length), prefetch(g + next, length);
          prefetch(m + next, length), prefetch(v + next, length);
          update_row(w + rest, g + rest, m + rest, v + rest, n - body, r);
        }
        at += n;
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vimnas_ds, CPU, m) { m.impl("sliced_adamw_", adamw_cpu); }

}  // namespace vimnas
