// y = x w^T + bias with w packed in panels: what the kernel is given.
//
// Legend: M rows, K inner, N columns; a word is 32 bits of the inner dimension: G = 1 float32,
// 2 bfloat16 or 4 int8. S = ceil(K / G) words. A panel is 48 columns: [1 + S][48] words. Its first
// row holds what the columns' sums start from: the bias in float32, or, for int8, the int32
// compensation -128 sum_k w (x is multiplied as unsigned bytes, 128 too large).
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"

namespace tilewise {

constexpr int64_t kPanel = 48;

struct Linear {
  const void* x;  // [M, K], column stride 1
  const void* panels;
  const float* scale;  // [N], int8 only
  const float* bias;   // [N] or null, int8 only: the others have it in their panels
  void* y;             // [M, N] contiguous, of x's dtype
  int32_t* words;      // [M, S]: x as the kernel multiplies it; unused where x is that already
  float* row_scale;    // [M], int8 only
  c10::ScalarType x_dtype, dtype;
  int64_t m, k, n, x_stride;
};

// How many elements of `dtype` a word holds.
inline int64_t per_word(c10::ScalarType dtype) {
  return 4 / static_cast<int64_t>(c10::elementSize(dtype));
}

// Whether x can be multiplied where it lies.
inline bool reads_x_in_place(const Linear& args) {
  return args.x_dtype == args.dtype && args.k % per_word(args.dtype) == 0;
}

TILEWISE_PER_CAPABILITY(
  // Whether this CPU has the instructions, and for `dtype` nothing better that torch would use.
  bool linear_runs(c10::ScalarType dtype);
  void linear(const Linear& args);
)

}  // namespace tilewise
