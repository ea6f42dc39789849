// Rows shared among threads in blocks of one size, so that results do not depend on how many
// threads there are.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>

#include "rows.h"

namespace vimnas {

constexpr int64_t kBlockRows = 32;

// f(first row, rows) for every block.
template <class F>
void each_block(int64_t rows, int64_t cols, const F& f) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t grain = std::max<int64_t>(1, 16384 / (kBlockRows * std::max<int64_t>(1, cols)));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(b * kBlockRows, std::min(kBlockRows, rows - b * kBlockRows));
    }
  });
}

// f(first row, rows, sums (cols)) for every block; returns the blocks' sums, added up: (cols).
template <class W, class F>
at::Tensor sum_over_blocks(int64_t rows, int64_t cols, const F& f) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const at::Tensor partial = at::empty({blocks, cols}, c10::CppTypeToScalarType<W>::value);
  W* const sums = partial.mutable_data_ptr<W>();
  each_block(rows, cols, [&](int64_t first, int64_t count) {
    W* const mine = sums + first / kBlockRows * cols;
    std::fill_n(mine, cols, W(0));
    f(first, count, mine);
  });
  return partial.sum(0);
}

}  // namespace vimnas
