// y = x w^T + bias for few rows of x, w read where it lies: what the kernel is given.
//
// Legend: M rows, K inner, N columns.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

struct FewRows {
  const void* x;       // [M, K], column stride 1
  const void* weight;  // [N, K], column stride 1
  const void* bias;    // [N] contiguous, or null
  void* y;             // [M, N] contiguous
  Float dtype;         // of all four: f32 or bf16
  int64_t m, k, n, x_stride, weight_stride;
};

TILEWISE_PER_CAPABILITY(
  // The rows up to which this measures faster than what torch has for the dtype.
  int64_t few_rows_most(c10::ScalarType dtype);
  void few_rows(const FewRows& args);
)

}  // namespace tilewise
