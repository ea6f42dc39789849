// Rows shared among threads in blocks of one size, so that results do not depend on how many
// threads there are.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

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

// f(first row, rows, sums (cols)) for every block; writes the blocks' sums, added up in their
// order, to out (cols).
template <class W, class T, class F>
void sum_over_blocks(int64_t rows, int64_t cols, T* out, const F& f) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<W> partial(blocks * cols, W(0));
  each_block(rows, cols, [&](int64_t first, int64_t count) {
    f(first, count, partial.data() + first / kBlockRows * cols);
  });
  for (int64_t b = 1; b < blocks; ++b) {
    rows::column_sums(partial.data() + b * cols, partial.data(), 1, cols);
  }
  std::copy_n(partial.data(), blocks > 0 ? cols : 0, out);
  if (blocks == 0) std::fill_n(out, cols, T(0));
}

}  // namespace vimnas
