// Layer and RMS normalisation of s = dropout(x) + residual: what the CPU kernels are given.
//
// Legend: tensors [..., N] are seen as `rows` (M) rows of `columns` (N) columns. Outputs are
// contiguous. Statistics and sums are float32, float64 for float64: the wide type.
#pragma once

#include <cstdint>

#include "capability.h"
#include "dropout.h"
#include "floats.h"

namespace tilewise {

// [M, N] with column stride 1; `stride` elements lie between rows. No data: an absent operand.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;
};

// The normal n is (s - mean) * rstd, without a mean s * rstd (RMS); y = n * weight + bias.
struct NormForward {
  Matrix x, residual;
  const void *weight, *bias;  // [N] of the parameter type, or null for 1 and 0
  void *y, *s;                // s is null where it is not wanted
  void *mean, *rstd;          // [M] of the wide type, both null where they are not wanted
  Float x_type, s_type, parameter_type;
  int64_t rows, columns;
  double eps;
  Dropout dropout;
  bool rms;
  bool streamed;  // outputs are too large for the caches: write past them
};

// ds = rstd * (g - mean(g) - n * mean(g * n)) + grad_s with g = grad * weight (RMS: no mean(g));
// dx is the part of ds that dropout let through, in x's type; dweight = sum(grad * n) over rows,
// dbias = sum(grad).
struct NormBackward {
  Matrix grad, grad_s, s;
  const void* weight;           // or null for 1
  const void *mean, *rstd;      // mean is null for RMS
  void *dx, *ds;                // either or both may be null
  void *dweight, *dbias;        // of the parameter type; either or both may be null
  void* partial;                // [norm_blocks(M), 2, partial_stride] of the wide type
  Float x_type, s_type, parameter_type;
  int64_t rows, columns, partial_stride;
  Dropout dropout;
  bool streamed;
};

// Blocks of rows with sums of their own for dweight and dbias. The sums are added up in order, so
// that their bits depend on the number of rows alone.
inline int64_t norm_blocks(int64_t rows) {
  const int64_t wanted = (rows + 31) / 32;
  return wanted < 64 ? wanted : 64;
}

TILEWISE_PER_CAPABILITY(
  void norm_forward(const NormForward& args);
  void norm_backward(const NormBackward& args);
)

}  // namespace tilewise
