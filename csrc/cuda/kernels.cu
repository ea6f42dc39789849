// The kernels for nvcc: dtype dispatch only. No torch header, so that this compiles in seconds.
#include "kernels.cuh"

namespace vimnas::cuda {
namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Calls `launch` with a null pointer of the element type.
template <class Launch>
void by_type(Type type, Launch launch) {
  if (type == Type::kFloat32) {
    launch(static_cast<float*>(nullptr));
  } else {
    launch(static_cast<__nv_bfloat16*>(nullptr));
  }
}

template <class T>
const T* in(const void* p, T*) {
  return static_cast<const T*>(p);
}

template <class T>
T* out(void* p, T*) {
  return static_cast<T*>(p);
}

}  // namespace

void adamw(AdamBatch& batch, void* stream) { launch_adamw(batch, stream_of(stream)); }

void gelu(Type type, const void* x, void* y, int64_t count, void* stream) {
  by_type(type, [&](auto* t) { launch_gelu(in(x, t), out(y, t), count, stream_of(stream)); });
}

int column_blocks(int64_t rows, int64_t cols) { return blocks_along_rows(rows, cols); }

void gelu_backward(Type type, const void* dy, int64_t ld, const void* pre, void* dpre,
                   float* partial, int64_t rows, int64_t cols, void* stream) {
  by_type(type, [&](auto* t) {
    launch_columns<GeluBackward>(in(dy, t), ld, in(pre, t), nullptr, out(dpre, t), partial, rows,
                                 cols, 1, stream_of(stream));
  });
}

void bias_gradient(Type type, const void* dy, int64_t ld, float* partial, int64_t rows,
                   int64_t cols, void* stream) {
  by_type(type, [&](auto* t) {
    launch_columns<BiasGradient>(in(dy, t), ld, in(nullptr, t), nullptr, out(nullptr, t), partial,
                                 rows, cols, 1, stream_of(stream));
  });
}

void finish_bias(Type type, const float* partial, int blocks, int groups, int64_t cols, void* db,
                 int64_t total, void* stream) {
  by_type(type, [&](auto* t) {
    launch_add_partials(partial, blocks, groups, cols, out(db, t), total, stream_of(stream));
  });
}

void zero_outside(void* dw, int64_t groups, int64_t total_out, int64_t total_in, int64_t out,
                  int64_t in, size_t element, void* stream) {
  launch_zero_outside(dw, groups, total_out, total_in, out, in, element, stream_of(stream));
}

void gated_gelu(Type type, const void* x, const float* mass, void* y, int64_t rows, int64_t cols,
                void* stream) {
  by_type(type, [&](auto* t) {
    launch_gate<GatedGelu>(in(x, t), mass, out(y, t), rows, cols, 1, stream_of(stream));
  });
}

void gated_gelu_backward(Type type, const void* dy, const void* x, const float* mass, void* dx,
                         float* partial, float* dmass, int64_t rows, int64_t cols, void* stream) {
  by_type(type, [&](auto* t) {
    launch_columns<GatedGeluBackward>(in(dy, t), cols, in(x, t), mass, out(dx, t), partial, rows,
                                      cols, 1, stream_of(stream));
  });
  launch_add_partials(partial, column_blocks(rows, cols), 1, cols, dmass, cols, stream_of(stream));
}

void head_gate(Type type, const void* x, const float* mass, void* y, int64_t rows, int heads,
               int head_dim, void* stream) {
  by_type(type, [&](auto* t) {
    launch_gate<HeadGate>(in(x, t), mass, out(y, t), rows, int64_t{heads} * head_dim, head_dim,
                          stream_of(stream));
  });
}

void head_gate_backward(Type type, const void* dy, const void* x, const float* mass, void* dx,
                        float* partial, float* dmass, int64_t rows, int heads, int head_dim,
                        void* stream) {
  const int64_t cols = int64_t{heads} * head_dim;
  by_type(type, [&](auto* t) {
    launch_columns<HeadGateBackward>(in(dy, t), cols, in(x, t), mass, out(dx, t), partial, rows,
                                     cols, head_dim, stream_of(stream));
  });
  launch_add_heads(partial, column_blocks(rows, cols), heads, head_dim, dmass, stream_of(stream));
}

int norm_blocks(int64_t rows) { return blocks_of_norm(rows); }

void gated_norm(Type type, const void* x, const float* mass, const void* weight, const void* bias,
                void* y, float* stats, int64_t rows, int cols, float eps, void* stream) {
  by_type(type, [&](auto* t) {
    launch_norm(in(x, t), mass, in(weight, t), in(bias, t), out(y, t), stats, rows, cols, eps,
                stream_of(stream));
  });
}

void gated_norm_backward(Type type, const void* dy, const void* x, const float* mass,
                         const void* weight, const void* bias, const float* stats, void* dx,
                         float* partial, float* dmass, int64_t rows, int cols, void* stream) {
  by_type(type, [&](auto* t) {
    launch_norm_backward(in(dy, t), in(x, t), mass, in(weight, t), in(bias, t), stats, out(dx, t),
                         partial, rows, cols, stream_of(stream));
  });
  launch_add_partials(partial, norm_blocks(rows), 1, cols, dmass, cols, stream_of(stream));
}

}  // namespace vimnas::cuda
