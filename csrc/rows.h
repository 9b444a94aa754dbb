// Tensors [..., N] as the rows that a kernel walks: what the op files share.
#pragma once

#include <ATen/core/Tensor.h>

namespace tilewise {

// The dtype that sums over a tensor are kept in.
inline at::ScalarType wide_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// `tensor` with column stride 1; a copy only where it has another.
inline at::Tensor unit_column_stride(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// [M, N] with column stride 1, or `tensor` itself where it is contiguous, whatever its dimensions;
// a copy only where the strides demand one.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return unit_column_stride(tensor.reshape({-1, tensor.size(-1)}));
}

// The number of rows of a tensor that has columns, and the distance of two rows of what as_rows
// returned, in elements.
inline int64_t row_count(const at::Tensor& tensor) { return tensor.numel() / tensor.size(-1); }
inline int64_t row_stride(const at::Tensor& rows) {
  return rows.is_contiguous() ? rows.size(-1) : rows.stride(0);
}

}  // namespace tilewise
