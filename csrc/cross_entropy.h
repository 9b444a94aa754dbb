// Cross-entropy over the last dimension on the CPU: losses, and the gradient of the logits.
//
// Legend: M rows of `columns` (V) logits with column stride 1, `stride` elements apart; target [M].
// With lse = top + log_sum and p = exp(x - lse), smoothing e and z-loss factor z:
//
//   loss = lse - (1 - e) x[target] - e / V sum(x) + z lse^2
//   dx   = weight ((1 + 2 z lse) p - (1 - e) [column == target] - e / V)
//
// A row whose target is `ignored` has loss 0 and gradient 0. Losses, weights and statistics are
// float32, or float64 for float64 logits.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

struct CrossEntropy {
  const void* logits;
  const int64_t* target;
  void* losses;        // [M], or null
  void* statistics;    // [M, 2]: top and log_sum, written where there are losses, else read; or null
  void* dlogits;       // [M, V] contiguous, or null; may be the logits themselves
  const void* weight;  // of each row's gradient: [M], or [1] with weight_stride 0
  Float dtype;
  int64_t rows, columns, stride, weight_stride, ignored;
  double smoothing, z, divisor;  // divisor: of every weight
};

TILEWISE_PER_CAPABILITY(void cross_entropy(const CrossEntropy& args);)

}  // namespace tilewise
