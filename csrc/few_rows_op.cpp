// x w^T + bias for few rows: schema, argument checks, choice of kernel.
//
// Shapes: x [..., K], weight [N, K], bias [N], float32 or bfloat16; y [..., N].

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "capability.h"
#include "checks.h"
#include "few_rows.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr const char* kOp = "few_rows";

int64_t most(at::ScalarType dtype) { return TILEWISE_BEST(few_rows_most)(dtype); }

Tensor few_rows_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_min_rank(kOp, "x", x, 1);
  check_dtype(kOp, "x", x, {at::kFloat, at::kBFloat16});
  check_same_dtype(kOp, "weight", weight, "x", x);
  check_same_device(kOp, "weight", weight, "x", x);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(-1), kOp,
                    ": weight has shape ", weight.sizes(), "; it must be [N, ", x.size(-1), "].");
  if (bias) {
    check_same_dtype(kOp, "bias", *bias, "x", x);
    check_same_device(kOp, "bias", *bias, "x", x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), kOp,
                      ": bias has shape ", bias->sizes(), "; it must be [", weight.size(0), "].");
  }
  at::DimVector shape(x.sizes());
  shape.back() = weight.size(0);
  const Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  if (x.numel() == 0) return bias ? y.copy_(*bias) : y.zero_();  // K = 0
  const Tensor x_rows = as_rows(x), w_rows = as_rows(weight);
  const std::optional<Tensor> shift = bias ? std::optional(bias->contiguous()) : bias;
  FewRows args{};
  args.x = x_rows.const_data_ptr();
  args.weight = w_rows.const_data_ptr();
  args.bias = shift ? shift->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.dtype = float_of(x);
  args.m = row_count(x);
  args.k = x.size(-1);
  args.n = weight.size(0);
  args.x_stride = row_stride(x_rows);
  args.weight_stride = row_stride(w_rows);
  TILEWISE_BEST(few_rows)(args);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("few_rows_most(ScalarType dtype) -> int", most);
  m.def("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) { m.impl("few_rows", few_rows_cpu); }

}  // namespace tilewise
