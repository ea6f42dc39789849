// Launchers of the CUDA kernels: plain C++ and raw pointers, shared by nvcc, g++ and the host
// tests.
//
// Every launcher enqueues on `stream` (a cudaStream_t) and returns; nothing waits for the device.
// Matrices are row-major; `ld` is the distance of two rows in elements. A backward pass that sums
// over rows first writes float32 partial sums (blocks x columns) into `partial`, then adds them up
// in a fixed order, so that results do not change from run to run.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vimnas::cuda {

enum class Type { kFloat32, kBFloat16 };

// ------------------------------------------------------------------------------ AdamW over boxes
struct AdamBox {
  int64_t offset;  // of the first element in the flat tensors
  int64_t stride;  // distance of two rows
  int rows;
  int cols;
  float step_size;   // lr / (1 - beta1^n)
  float correction;  // sqrt(1 - beta2^n)
  int first_block;   // set by the launcher
};
constexpr int kMaxBoxes = 80;
struct AdamBatch {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float decay, beta1, beta2, eps;
  int count;
  AdamBox box[kMaxBoxes];
};
static_assert(sizeof(AdamBatch) <= 4096, "a batch of boxes travels in the kernel's arguments");

void adamw(AdamBatch& batch, void* stream);

// ------------------------------------------------------------------------------- sliced linear
void gelu(Type type, const void* x, void* y, int64_t count, void* stream);

// How many rows of partial sums the column kernels below write for a rows x cols matrix.
int column_blocks(int64_t rows, int64_t cols);

// dpre = dy * gelu'(pre), and the column sums of dpre. dy has its own ld; pre and dpre are dense.
void gelu_backward(Type type, const void* dy, int64_t ld, const void* pre, void* dpre,
                   float* partial, int64_t rows, int64_t cols, void* stream);
void bias_gradient(Type type, const void* dy, int64_t ld, float* partial, int64_t rows,
                   int64_t cols, void* stream);
// db (groups, total): the sums of partial (groups, blocks, cols), zero from column cols on.
void finish_bias(Type type, const float* partial, int blocks, int groups, int64_t cols, void* db,
                 int64_t total, void* stream);
// Zeros outside the leading out x in block of each (total_out, total_in) matrix.
void zero_outside(void* dw, int64_t groups, int64_t total_out, int64_t total_in, int64_t out,
                  int64_t in, size_t element, void* stream);

// ---------------------------------------------------------------------------------------- gates
void gated_gelu(Type type, const void* x, const float* mass, void* y, int64_t rows, int64_t cols,
                void* stream);
void gated_gelu_backward(Type type, const void* dy, const void* x, const float* mass, void* dx,
                         float* partial, float* dmass, int64_t rows, int64_t cols, void* stream);
void head_gate(Type type, const void* x, const float* mass, void* y, int64_t rows, int heads,
               int head_dim, void* stream);
void head_gate_backward(Type type, const void* dy, const void* x, const float* mass, void* dx,
                        float* partial, float* dmass, int64_t rows, int heads, int head_dim,
                        void* stream);

constexpr int kMaxNormWidth = 11264;  // the backward pass keeps its column sums in 44 KiB
int norm_blocks(int64_t rows);        // rows of partial sums of gated_norm_backward
void gated_norm(Type type, const void* x, const float* mass, const void* weight, const void* bias,
                void* y, float* stats, int64_t rows, int cols, float eps, void* stream);
void gated_norm_backward(Type type, const void* dy, const void* x, const float* mass,
                         const void* weight, const void* bias, const float* stats, void* dx,
                         float* partial, float* dmass, int64_t rows, int cols, void* stream);

}  // namespace vimnas::cuda
