// Masked, scaled softmax over the last dimension: what the CPU and CUDA kernels are given.
//
// Legend: a tensor [..., N] is seen as `rows` rows of `columns` (N) columns; `queries` is the size
// of the dimension before the last, which causal masking counts along. Strides and offsets are in
// elements. No ATen here, so that the CUDA compiler reads this header without PyTorch.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

#ifdef __CUDACC__
#define TILEWISE_HOST_DEVICE __host__ __device__
#else
#define TILEWISE_HOST_DEVICE
#endif

namespace tilewise {

enum class Mask { none, boolean, f32, same_as_x };  // boolean: true = attend; float: added

constexpr int kMaxOuterDims = 16;

// Where each row of up to two operands begins: the outer dimensions, innermost first, merged
// where both operands allow it, so that plain tensors have one and a row costs no division.
struct Rows {
  int dims = 0;
  int64_t size[kMaxOuterDims];
  int64_t stride[2][kMaxOuterDims];
};

struct RowOffset {
  int64_t operand[2];
};

static inline TILEWISE_HOST_DEVICE RowOffset offset_of(const Rows& rows, int64_t row) {
  RowOffset offset{{0, 0}};
  for (int d = 0; d < rows.dims; ++d) {
    const bool outermost = d + 1 == rows.dims;
    const int64_t quotient = outermost ? 0 : row / rows.size[d];
    const int64_t index = row - quotient * rows.size[d];
    offset.operand[0] += index * rows.stride[0][d];
    offset.operand[1] += index * rows.stride[1][d];
    row = quotient;
  }
  return offset;
}

// y = softmax(scale * x + mask); y is contiguous. Rows walks x (0) and mask (1).
struct SoftmaxForward {
  const void* x;
  const void* mask;
  void* y;
  Float dtype;
  Mask mask_kind;
  int64_t num_rows, columns, queries;
  int64_t x_column_stride, mask_column_stride;
  Rows rows;
  double scale;
  bool causal;
};

// dx = scale * y * (grad - sum(grad * y)); y and dx are contiguous. Rows walks grad (0) alone.
struct SoftmaxBackward {
  const void* grad;
  const void* y;
  void* dx;
  Float dtype;
  int64_t num_rows, columns;
  int64_t grad_column_stride;
  Rows rows;
  double scale;
};

// Columns that a row attends to under causal masking, aligned to the bottom right corner.
static inline TILEWISE_HOST_DEVICE int64_t attended(const SoftmaxForward& args, int64_t row) {
  if (!args.causal) return args.columns;
  const int64_t last = row % args.queries + args.columns - args.queries;
  return last < 0 ? 0 : last + 1;
}

TILEWISE_PER_CAPABILITY(
  void softmax_forward(const SoftmaxForward& args);
  void softmax_backward(const SoftmaxBackward& args);
)

// Launch on `stream` (a cudaStream_t) of the current device. x and grad have column stride 1.
// Return null, or what CUDA said was wrong with the launch.
namespace cuda {
const char* softmax_forward(const SoftmaxForward& args, void* stream);
const char* softmax_backward(const SoftmaxBackward& args, void* stream);
}  // namespace cuda

}  // namespace tilewise
