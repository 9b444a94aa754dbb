// Rotary position embedding: what the CPU kernel is given.
//
// Legend: x [B, H, S, D]; the first R = 2 * half of the D columns turn, by the angle of their
// (batch, token) pair, whose cosines and sines are rows of `half` numbers. Strides in elements.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

// y = x turned, or turned back where `inverse`. Columns of x, y, cos and sin have stride 1; cos and
// sin are float, or double for double x, and share their strides.
struct Rotary {
  const void* x;
  const void* cos;
  const void* sin;
  void* y;
  Float dtype;
  bool interleaved, inverse;
  int64_t batch, heads, tokens, columns, half;
  int64_t x_batch, x_head, x_token;
  int64_t y_batch, y_head, y_token;
  int64_t table_batch, table_token;
};

TILEWISE_PER_CAPABILITY(void rotary(const Rotary& args);)

}  // namespace tilewise
