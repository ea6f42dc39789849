// The passes of rows.h, as plain loops that the compiler vectorises (`omp simd` where it must be
// allowed to reorder a sum). GELU in its tanh form is x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3),
// s the logistic function: half the work of tanh and, for negative x, without its cancellation.
#include "rows.h"

#include <bit>
#include <cmath>

#include "clones.h"

namespace vimnas::rows {
namespace {

using c10::BFloat16;

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) { return std::bit_cast<float>(uint32_t(p->x) << 16); }

inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(BFloat16* p, float v) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  p->x = uint16_t(v != v ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline double exponential(double x) { return std::exp(x); }

// Within 2 ulp: 2^n by the exponent's bits, e^r by a polynomial, |r| <= ln(2) / 2.
inline float exponential(float x) {
  x = x < 88.0f ? x : 88.0f;
  x = x > -87.0f ? x : -87.0f;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the sum's last bits are n
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98756912e-4f;  // Cephes' expf
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345018e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(shifted) << 23));
}

template <class W>
inline W gelu_of(W x, W& derivative) {
  constexpr W kTwice = W(1.5957691216057308), kCube = W(0.044715);  // 2 sqrt(2 / pi)
  // beyond 20 the function is 0 or x to the last bit; NaN passes both comparisons
  const W low = x < W(-20) ? W(-20) : x, t = low > W(20) ? W(20) : low;
  const W square = t * t;
  const W s = 1 / (1 + exponential(-kTwice * t * (1 + kCube * square)));
  derivative = s + t * s * (1 - s) * kTwice * (1 + 3 * kCube * square);
  return low * s;
}

template <class T>
inline __attribute__((always_inline)) void add_bias_rows(T* y, const T* bias, int64_t rows,
                                                         int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, y += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) store(y + c, load(y + c) + load(bias + c));
  }
}

template <class T>
inline __attribute__((always_inline)) void column_sums_rows(const T* dy, Wide<T>* sums,
                                                            int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, dy += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) sums[c] += load(dy + c);
  }
}

template <class T>
inline __attribute__((always_inline)) void gelu_rows(T* pre, const T* bias, T* y, int64_t rows,
                                                     int64_t cols) {
  using W = Wide<T>;
  for (int64_t row = 0; row < rows; ++row, pre += cols, y += cols) {
    if (bias != nullptr) add_bias_rows(pre, bias, 1, cols);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      W derivative;
      store(y + c, gelu_of(W(load(pre + c)), derivative));
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void gelu_backward_rows(const T* dy, const T* pre, T* dpre,
                                                              Wide<T>* sums, int64_t rows,
                                                              int64_t cols) {
  using W = Wide<T>;
  for (int64_t row = 0; row < rows; ++row, dy += cols, pre += cols, dpre += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      W derivative;
      gelu_of(W(load(pre + c)), derivative);
      const W d = load(dy + c) * derivative;
      sums[c] += d;
      store(dpre + c, d);
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void gated_gelu_rows(const T* x, const Wide<T>* mass, T* y,
                                                           int64_t rows, int64_t cols) {
  using W = Wide<T>;
  for (int64_t row = 0; row < rows; ++row, x += cols, y += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      W derivative;
      store(y + c, mass[c] * gelu_of(W(load(x + c)), derivative));
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void gated_gelu_backward_rows(const T* dy, const T* x,
                                                                    const Wide<T>* mass, T* dx,
                                                                    Wide<T>* sums, int64_t rows,
                                                                    int64_t cols) {
  using W = Wide<T>;
  for (int64_t row = 0; row < rows; ++row, dy += cols, x += cols, dx += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      W derivative;
      const W y = gelu_of(W(load(x + c)), derivative), d = load(dy + c);
      sums[c] += d * y;
      store(dx + c, d * mass[c] * derivative);
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void scale_rows(const T* x, const Wide<T>* mass, T* y,
                                                      int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += cols, y += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) store(y + c, mass[c] * load(x + c));
  }
}

template <class T>
inline __attribute__((always_inline)) void scale_backward_rows(const T* dy, const T* x,
                                                               const Wide<T>* mass, T* dx,
                                                               Wide<T>* sums, int64_t rows,
                                                               int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, dy += cols, x += cols, dx += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const Wide<T> d = load(dy + c);
      sums[c] += d * load(x + c);
      store(dx + c, d * mass[c]);
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void norm_rows(const T* x, const Norm<Wide<T>>& n, T* y,
                                                     Wide<T>* stats, int64_t rows, int64_t cols) {
  using W = Wide<T>;
  const W *share = n.share, *weight = n.weight, *bias = n.bias, *mass = n.mass;
  for (int64_t row = 0; row < rows; ++row, x += cols, y += cols, stats += 2) {
    W mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < cols; ++c) mean += share[c] * load(x + c);
#pragma omp simd reduction(+ : variance)
    for (int64_t c = 0; c < cols; ++c) {
      const W centred = load(x + c) - mean;
      variance += share[c] * centred * centred;
    }
    const W rstd = 1 / std::sqrt(variance + n.eps);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      store(y + c, mass[c] * ((load(x + c) - mean) * rstd * weight[c] + bias[c]));
    }
    stats[0] = mean;
    stats[1] = rstd;
  }
}

// h = (x - mean) rstd, a = dy mass weight rstd, A = sum(a), B = sum(a h), V = sum(share h^2):
//   dx = a - share (A + h B)
//   dmass = dy (h weight + bias) - (A h + B (h^2 - V) / 2) / (rstd total)
template <class T>
inline __attribute__((always_inline)) void norm_backward_rows(const T* dy, const T* x,
                                                              const Norm<Wide<T>>& n,
                                                              const Wide<T>* stats, T* dx,
                                                              Wide<T>* sums, int64_t rows,
                                                              int64_t cols) {
  using W = Wide<T>;
  const W *share = n.share, *weight = n.weight, *bias = n.bias, *mass = n.mass;
  for (int64_t row = 0; row < rows; ++row, dy += cols, x += cols, dx += cols, stats += 2) {
    const W mean = stats[0], rstd = stats[1];
    W first = 0, second = 0, spread = 0;
#pragma omp simd reduction(+ : first, second, spread)
    for (int64_t c = 0; c < cols; ++c) {
      const W h = (load(x + c) - mean) * rstd, a = load(dy + c) * mass[c] * weight[c] * rstd;
      first += a;
      second += a * h;
      spread += share[c] * h * h;
    }
    const W per_mass = 1 / (rstd * n.total);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const W h = (load(x + c) - mean) * rstd, d = load(dy + c);
      const W a = d * mass[c] * weight[c] * rstd;
      store(dx + c, a - share[c] * (first + h * second));
      sums[c] += d * (h * weight[c] + bias[c]) -
                 (first * h + W(0.5) * second * (h * h - spread)) * per_mass;
    }
  }
}

}  // namespace

#define VIMNAS_ROWS(T)                                                                           \
  VIMNAS_CLONES void add_bias(T* y, const T* bias, int64_t rows, int64_t cols) {                 \
    add_bias_rows(y, bias, rows, cols);                                                          \
  }                                                                                              \
  VIMNAS_CLONES void column_sums(const T* dy, Wide<T>* sums, int64_t rows, int64_t cols) {       \
    column_sums_rows(dy, sums, rows, cols);                                                      \
  }                                                                                              \
  VIMNAS_CLONES void gelu(T* pre, const T* bias, T* y, int64_t rows, int64_t cols) {             \
    gelu_rows(pre, bias, y, rows, cols);                                                         \
  }                                                                                              \
  VIMNAS_CLONES void gelu_backward(const T* dy, const T* pre, T* dpre, Wide<T>* sums,            \
                                   int64_t rows, int64_t cols) {                                 \
    gelu_backward_rows(dy, pre, dpre, sums, rows, cols);                                         \
  }                                                                                              \
  VIMNAS_CLONES void gated_gelu(const T* x, const Wide<T>* mass, T* y, int64_t rows,             \
                                int64_t cols) {                                                  \
    gated_gelu_rows(x, mass, y, rows, cols);                                                     \
  }                                                                                              \
  VIMNAS_CLONES void gated_gelu_backward(const T* dy, const T* x, const Wide<T>* mass, T* dx,    \
                                         Wide<T>* sums, int64_t rows, int64_t cols) {            \
    gated_gelu_backward_rows(dy, x, mass, dx, sums, rows, cols);                                 \
  }                                                                                              \
  VIMNAS_CLONES void scale(const T* x, const Wide<T>* mass, T* y, int64_t rows, int64_t cols) {  \
    scale_rows(x, mass, y, rows, cols);                                                          \
  }                                                                                              \
  VIMNAS_CLONES void scale_backward(const T* dy, const T* x, const Wide<T>* mass, T* dx,         \
                                    Wide<T>* sums, int64_t rows, int64_t cols) {                 \
    scale_backward_rows(dy, x, mass, dx, sums, rows, cols);                                      \
  }                                                                                              \
  VIMNAS_CLONES void norm(const T* x, const Norm<Wide<T>>& n, T* y, Wide<T>* stats,              \
                          int64_t rows, int64_t cols) {                                          \
    norm_rows(x, n, y, stats, rows, cols);                                                       \
  }                                                                                              \
  VIMNAS_CLONES void norm_backward(const T* dy, const T* x, const Norm<Wide<T>>& n,              \
                                   const Wide<T>* stats, T* dx, Wide<T>* sums, int64_t rows,     \
                                   int64_t cols) {                                               \
    norm_backward_rows(dy, x, n, stats, dx, sums, rows, cols);                                   \
  }
VIMNAS_ROWS(float)
VIMNAS_ROWS(double)
VIMNAS_ROWS(BFloat16)
#undef VIMNAS_ROWS

}  // namespace vimnas::rows
