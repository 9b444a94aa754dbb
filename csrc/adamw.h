// AdamW over a list of tensors: what the CPU kernels are given.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

// What the step needs of one parameter: flat arrays of `size` elements, one order in all of them.
struct AdamWPlace {
  void* param;
  const void* grad;
  void* m;        // of moment_dtype: float or that of param
  void* v;        // likewise
  float* master;  // or null
  Float dtype, moment_dtype;
  int64_t size;
  int64_t start;  // elements of the places before this one
};

// One step, in place:
//   m = beta1 m + (1 - beta1) g          w = (1 - decay) w - step_size m / (sqrt(v) / root + eps)
//   v = beta2 v + (1 - beta2) g^2        param = w, rounded
// where g = grad_scale * grad and w is the master, or the parameter itself without one. decay is
// lr * weight_decay, step_size lr / (1 - beta1^t), root sqrt(1 - beta2^t).
struct AdamW {
  double beta1, beta2, eps, decay, step_size, root, grad_scale;
};

TILEWISE_PER_CAPABILITY(
  void adamw(const AdamWPlace* places, int64_t count, const AdamW& how);
  double sum_of_squares(const AdamWPlace* places, int64_t count);  // of the gradients
)

}  // namespace tilewise
