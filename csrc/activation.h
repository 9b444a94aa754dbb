// What stands between the two products of a feed-forward block: what the CPU kernels are given.
//
// Legend: h, g, a and their gradients are [M, F], contiguous. a = drop(act(h) * g), without the
// factor g where it is null.
#pragma once

#include <cstdint>

#include "capability.h"
#include "dropout.h"
#include "floats.h"

namespace tilewise {

enum class Act { gelu, gelu_tanh, relu, silu, quick_gelu, identity };

struct Activation {
  const void* h;
  const void* g;  // or null
  void* a;        // backward: or null
  Float dtype;
  Act act;
  int64_t rows, columns;
  Dropout dropout;
};

// Outputs may be the very memory of inputs.
struct ActivationBackward {
  Activation forward;
  const void* da;
  void* dh;
  void* dg;  // or null
};

TILEWISE_PER_CAPABILITY(
  void activation(const Activation& args);
  void activation_backward(const ActivationBackward& args);
)

}  // namespace tilewise
