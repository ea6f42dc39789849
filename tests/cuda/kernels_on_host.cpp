// The CUDA kernels and their launchers, compiled by the host compiler, behind a C interface for
// ctypes. No torch header: this builds in seconds. Every function returns 0, or 1 with a message.
#include <string>

#include "kernels.cu"

using namespace vimnas::cuda;

static std::string message;
static int sanitizer_reports = 0;

// Called by the sanitizer's runtime after each finding.
extern "C" void __ubsan_on_report() { ++sanitizer_reports; }

template <class F>
int guarded(F call) {
  sanitizer_reports = 0;
  try {
    call();
  } catch (const std::exception& e) {
    message = e.what();
    return 1;
  }
  message = "the sanitizer found undefined behaviour (see stderr)";
  return sanitizer_reports != 0;
}

static Type type_of(int bf16) { return bf16 ? Type::kBFloat16 : Type::kFloat32; }

extern "C" {

const char* host_error() { return message.c_str(); }

int host_max_boxes() { return kMaxBoxes; }

int host_column_blocks(int64_t rows, int64_t cols) { return column_blocks(rows, cols); }

int host_norm_blocks(int64_t rows) { return norm_blocks(rows); }

int host_adamw(float* w, const float* g, float* m, float* v, const int64_t* boxes,
               const double* rates, int count, float decay, float beta1, float beta2, float eps) {
  return guarded([&] {
    AdamBatch batch{w, g, m, v, decay, beta1, beta2, eps, count, {}};
    for (int n = 0; n < count; ++n) {
      const int64_t* box = boxes + 4 * n;
      batch.box[n] = {box[0],
                      box[3],
                      static_cast<int>(box[1]),
                      static_cast<int>(box[2]),
                      static_cast<float>(rates[2 * n]),
                      static_cast<float>(rates[2 * n + 1]),
                      0};
    }
    adamw(batch, nullptr);
  });
}

int host_gelu(int bf16, const void* x, void* y, int64_t count) {
  return guarded([&] { gelu(type_of(bf16), x, y, count, nullptr); });
}

int host_gelu_backward(int bf16, const void* dy, int64_t ld, const void* pre, void* dpre,
                       float* partial, int64_t rows, int64_t cols) {
  return guarded(
      [&] { gelu_backward(type_of(bf16), dy, ld, pre, dpre, partial, rows, cols, nullptr); });
}

int host_bias_gradient(int bf16, const void* dy, int64_t ld, float* partial, int64_t rows,
                       int64_t cols) {
  return guarded([&] { bias_gradient(type_of(bf16), dy, ld, partial, rows, cols, nullptr); });
}

int host_finish_bias(int bf16, const float* partial, int blocks, int groups, int64_t cols, void* db,
                     int64_t total) {
  return guarded(
      [&] { finish_bias(type_of(bf16), partial, blocks, groups, cols, db, total, nullptr); });
}

int host_zero_outside(void* dw, int64_t groups, int64_t total_out, int64_t total_in, int64_t out,
                      int64_t in, int64_t element) {
  return guarded([&] { zero_outside(dw, groups, total_out, total_in, out, in, element, nullptr); });
}

int host_gated_gelu(int bf16, const void* x, const float* mass, void* y, int64_t rows,
                    int64_t cols) {
  return guarded([&] { gated_gelu(type_of(bf16), x, mass, y, rows, cols, nullptr); });
}

int host_gated_gelu_backward(int bf16, const void* dy, const void* x, const float* mass, void* dx,
                             float* partial, float* dmass, int64_t rows, int64_t cols) {
  return guarded([&] {
    gated_gelu_backward(type_of(bf16), dy, x, mass, dx, partial, dmass, rows, cols, nullptr);
  });
}

int host_head_gate(int bf16, const void* x, const float* mass, void* y, int64_t rows, int64_t heads,
                   int64_t head_dim) {
  return guarded([&] {
    head_gate(type_of(bf16), x, mass, y, rows, static_cast<int>(heads), static_cast<int>(head_dim),
              nullptr);
  });
}

int host_head_gate_backward(int bf16, const void* dy, const void* x, const float* mass, void* dx,
                            float* partial, float* dmass, int64_t rows, int64_t heads,
                            int64_t head_dim) {
  return guarded([&] {
    head_gate_backward(type_of(bf16), dy, x, mass, dx, partial, dmass, rows,
                       static_cast<int>(heads), static_cast<int>(head_dim), nullptr);
  });
}

int host_gated_norm(int bf16, const void* x, const float* mass, const void* weight,
                    const void* bias, void* y, float* stats, int64_t rows, int64_t cols,
                    float eps) {
  return guarded([&] {
    gated_norm(type_of(bf16), x, mass, weight, bias, y, stats, rows, static_cast<int>(cols), eps,
               nullptr);
  });
}

int host_gated_norm_backward(int bf16, const void* dy, const void* x, const float* mass,
                             const void* weight, const void* bias, const float* stats, void* dx,
                             float* partial, float* dmass, int64_t rows, int64_t cols) {
  return guarded([&] {
    gated_norm_backward(type_of(bf16), dy, x, mass, weight, bias, stats, dx, partial, dmass, rows,
                        static_cast<int>(cols), nullptr);
  });
}

}  // extern "C"
