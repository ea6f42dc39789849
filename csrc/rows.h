// Element-wise passes over `rows` x `cols` matrices on the CPU, each reading and writing memory
// once. Values are computed in float (double for double); `sums` (cols) is added to.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace vimnas::rows {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The vectors and numbers of a gated norm.
template <class W>
struct Norm {
  const W* share;   // mass / sum(mass)
  const W* weight;  // as in LayerNorm
  const W* bias;
  const W* mass;
  W eps, total;  // total: sum(mass)
};

#define VIMNAS_ROWS(T)                                                                           \
  /* y += bias */                                                                                \
  void add_bias(T* y, const T* bias, int64_t rows, int64_t cols);                                \
  /* sums += dy */                                                                               \
  void column_sums(const T* dy, Wide<T>* sums, int64_t rows, int64_t cols);                      \
  /* pre += bias (unless null); y = gelu(pre) */                                                 \
  void gelu(T* pre, const T* bias, T* y, int64_t rows, int64_t cols);                            \
  /* dpre = dy gelu'(pre); sums += dpre */                                                       \
  void gelu_backward(const T* dy, const T* pre, T* dpre, Wide<T>* sums, int64_t rows,            \
                     int64_t cols);                                                              \
  /* y = mass gelu(x) */                                                                         \
  void gated_gelu(const T* x, const Wide<T>* mass, T* y, int64_t rows, int64_t cols);            \
  /* dx = dy mass gelu'(x); sums += dy gelu(x) */                                                \
  void gated_gelu_backward(const T* dy, const T* x, const Wide<T>* mass, T* dx, Wide<T>* sums,   \
                           int64_t rows, int64_t cols);                                          \
  /* y = mass x */                                                                               \
  void scale(const T* x, const Wide<T>* mass, T* y, int64_t rows, int64_t cols);                 \
  /* dx = mass dy; sums += dy x */                                                               \
  void scale_backward(const T* dy, const T* x, const Wide<T>* mass, T* dx, Wide<T>* sums,        \
                      int64_t rows, int64_t cols);                                               \
  /* y = mass ((x - mean) rstd weight + bias); stats: (mean, rstd) of each row */                \
  void norm(const T* x, const Norm<Wide<T>>& n, T* y, Wide<T>* stats, int64_t rows,              \
            int64_t cols);                                                                       \
  /* dx, and sums += gradient of the masses, through y and through the statistics */             \
  void norm_backward(const T* dy, const T* x, const Norm<Wide<T>>& n, const Wide<T>* stats,      \
                     T* dx, Wide<T>* sums, int64_t rows, int64_t cols);
VIMNAS_ROWS(float)
VIMNAS_ROWS(double)
VIMNAS_ROWS(c10::BFloat16)
#undef VIMNAS_ROWS

}  // namespace vimnas::rows
