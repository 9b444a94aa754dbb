// log-softmax over the last dimension, and its k largest values, on the CPU.
//
// Legend: M rows of `columns` (V) columns with column stride 1; x_stride and grad_stride are the
// distance of two rows, in elements. y, dx, scores [M, k] and ids [M, k] are contiguous.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

struct LogSoftmaxForward {
  const void* x;
  void* y;
  Float dtype;
  int64_t rows, columns, x_stride;
};

// dx = grad - exp(y) * sum(grad)
struct LogSoftmaxBackward {
  const void* grad;
  const void* y;
  void* dx;
  Float dtype;
  int64_t rows, columns, grad_stride;
};

// scores: float32, or float64 for float64.
struct LogSoftmaxTopk {
  const void* x;
  void* scores;
  int64_t* ids;
  Float dtype;
  int64_t rows, columns, x_stride, k;
};

TILEWISE_PER_CAPABILITY(
  void log_softmax_forward(const LogSoftmaxForward& args);
  void log_softmax_backward(const LogSoftmaxBackward& args);
  void log_softmax_topk(const LogSoftmaxTopk& args);
)

}  // namespace tilewise
