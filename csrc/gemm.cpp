// MKL splits each product among threads by itself, with a barrier after each. A layer's products
// come in groups and are tall, so here every thread takes a share of the rows of all of them, MKL
// inside on that thread alone: q, k and v then cost what one product of their joint width does (on
// two cores 0.92 to 1.02 of it, one after the other 1.00 to 1.13).
// With fewer than kRows rows a thread, without MKL, and in other dtypes: PyTorch's product.
#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

// exported by libtorch_cpu where it holds MKL
extern "C" __attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m,
                                             const int* n, const int* k, const float* alpha,
                                             const float* a, const int* lda, const float* b,
                                             const int* ldb, const float* beta, float* c,
                                             const int* ldc);

namespace vimnas {
namespace {

constexpr int64_t kRows = 64;  // fewest rows for which a thread is worth its copy of b

// A matrix as BLAS takes it. Row-major is BLAS's transpose: 'N' here, as c is transposed too.
struct Operand {
  const float* data;
  char transposed;
  int distance;
  int64_t row_stride;
};

std::optional<Operand> operand(const at::Tensor& t) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  const int64_t rows = t.size(0), cols = t.size(1), down = t.stride(0), across = t.stride(1);
  if (rows < 1 || cols < 1 || rows > kMax || cols > kMax) return {};
  const auto* data = t.const_data_ptr<float>();
  if (across == 1 && down >= cols && down <= kMax) return Operand{data, 'N', int(down), down};
  if (down == 1 && across >= rows && across <= kMax) return Operand{data, 'T', int(across), down};
  return {};
}

struct Call {
  Operand a, b, c;
  int n, k;
  float beta;

  void run(int64_t first, int64_t count) const {
    const float one = 1;
    const int m = int(count);
    float* out = const_cast<float*>(c.data) + first * c.row_stride;
    sgemm_(&b.transposed, &a.transposed, &n, &m, &k, &one, b.data, &b.distance,
           a.data + first * a.row_stride, &a.distance, &beta, out, &c.distance);
  }
};

// The products as calls of sgemm_; empty where one of them cannot be.
std::vector<Call> calls(c10::ArrayRef<Product> products) {
  std::vector<Call> found;
  if (sgemm_ == nullptr || !at::hasMKL()) return found;
  for (const Product& p : products) {
    if (p.c.scalar_type() != at::kFloat) return {};
    const auto a = operand(p.a), b = operand(p.b), c = operand(p.c);
    if (!a || !b || !c || c->transposed != 'N') return {};
    found.push_back({*a, *b, *c, int(p.b.size(1)), int(p.a.size(1)), float(p.beta)});
  }
  return found;
}

int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void by_pytorch(c10::ArrayRef<Product> products) {
  for (const Product& p : products) {
    at::Tensor c = p.c;
    c.addmm_(p.a, p.b, p.beta);
  }
}

// f(first, count) for each thread's share of `rows`.
template <class F>
void each_share(int64_t rows, int64_t threads, const F& f) {
  const int64_t share = (rows + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * share, count = std::min(end * share, rows) - first;
    if (count > 0) f(first, count);
  });
}

}  // namespace

void multiply(c10::ArrayRef<Product> products,
              c10::function_ref<void(int64_t first, int64_t count)> after) {
  const int64_t rows = products[0].c.size(0), threads = available_threads();
  const std::vector<Call> direct = calls(products);
  if (direct.empty() || rows < threads * kRows) {
    by_pytorch(products);
    at::parallel_for(0, rows, kRows,
                     [&](int64_t begin, int64_t end) { after(begin, end - begin); });
    return;
  }
  each_share(rows, threads, [&](int64_t first, int64_t count) {
    for (const Call& call : direct) call.run(first, count);
    after(first, count);
  });
}

void multiply(c10::ArrayRef<Product> products) {
  multiply(products, [](int64_t, int64_t) {});
}

void multiply_independent(c10::ArrayRef<Product> products) {
  const std::vector<Call> direct = calls(products);
  const int64_t threads = available_threads();
  int64_t total = 0;
  for (const Product& p : products) total += p.c.size(0);
  if (direct.empty() || total < threads * kRows) return by_pytorch(products);
  // the products' rows, one after the other, in equal shares
  each_share(total, threads, [&](int64_t begin, int64_t count) {
    int64_t at = 0;  // rows of the products before
    for (size_t p = 0; p < direct.size(); ++p) {
      const int64_t rows = products[p].c.size(0);
      const int64_t first = std::clamp<int64_t>(begin - at, 0, rows);
      const int64_t last = std::clamp<int64_t>(begin + count - at, 0, rows);
      if (first < last) direct[p].run(first, last - first);
      at += rows;
    }
  });
}

}  // namespace vimnas
