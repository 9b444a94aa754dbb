// The argument checks of every native op: each names the op and the tensor, says what it got and
// what it takes, and raises ValueError before any work starts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "floats.h"

namespace tilewise {

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor,
                        std::initializer_list<at::ScalarType> allowed) {
  const bool ok = std::find(allowed.begin(), allowed.end(), tensor.scalar_type()) != allowed.end();
  TORCH_CHECK_VALUE(ok, op, ": ", name, " has dtype ", tensor.scalar_type(), "; it takes ",
                    c10::ArrayRef<at::ScalarType>(allowed), ". Convert it with ", name, ".to().");
}

inline void check_min_rank(const char* op, const char* name, const at::Tensor& tensor,
                           int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() >= rank, op, ": ", name, " has ", tensor.dim(),
                    " dimensions; it takes at least ", rank, ".");
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                              const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op, ": ", name, " is on ", tensor.device(),
                    " but ", other_name, " is on ", other.device(), ". Move one to the other.");
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& tensor,
                             const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ",
                    tensor.scalar_type(), " but ", other_name, " has ", other.scalar_type(),
                    ". Convert one with .to().");
}

inline void check_same_shape(const char* op, const char* name, const at::Tensor& tensor,
                             const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), op, ": ", name, " has shape ",
                    tensor.sizes(), " but ", other_name, " has ", other.sizes(),
                    "; they must be equal.");
}

// The kernels' name for a tensor's dtype, which check_dtype has seen.
inline Float float_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Float::f64;
    case at::kBFloat16: return Float::bf16;
    case at::kHalf: return Float::f16;
    default: return Float::f32;
  }
}

// Whether `tensor` broadcasts to exactly the shape of `target`.
inline void check_broadcastable(const char* op, const char* name, const at::Tensor& tensor,
                                const char* target_name, const at::Tensor& target) {
  bool ok = tensor.dim() <= target.dim();
  for (int64_t d = 1; ok && d <= tensor.dim(); ++d) {
    ok = tensor.size(-d) == 1 || tensor.size(-d) == target.size(-d);
  }
  TORCH_CHECK_VALUE(ok, op, ": ", name, " has shape ", tensor.sizes(),
                    ", which does not broadcast to ", target_name, " of shape ", target.sizes(),
                    ". Each of its dimensions, counted from the last, must be 1 or equal.");
}

}  // namespace tilewise
