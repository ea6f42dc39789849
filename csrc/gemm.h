// Matrix products on the CPU.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

namespace vimnas {

// c = a b + beta c; matrices with one unit stride each, c's within rows.
struct Product {
  at::Tensor c, a, b;
  double beta;
};

// The products in their order; all `c` have as many rows. `after(first, count)` is then called for
// ranges of rows that are complete, where possible by the thread that made them; together they are
// all rows.
void multiply(c10::ArrayRef<Product> products,
              c10::function_ref<void(int64_t first, int64_t count)> after);
void multiply(c10::ArrayRef<Product> products);

// Products that do not depend on one another, in any order.
void multiply_independent(c10::ArrayRef<Product> products);

}  // namespace vimnas
