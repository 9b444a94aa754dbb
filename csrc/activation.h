// What stands between the two products of a feed-forward block: what the CPU kernels are given.
//
// Legend: h, g, a and their gradients are [M, F], contiguous. a = drop(act(h) * g), without the
// factor g where it is null and without dropout where `scale` is 1 and `threshold` 0.
#pragma once

#include <cstdint>

#include "capability.h"
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
  int64_t seed;
  uint32_t threshold;  // see dropout.h; 0 keeps everything
  double scale;        // of kept elements
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
