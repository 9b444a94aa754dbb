// rotary: schema, argument checks, choice of kernel.
//
// Shapes: x [B, H, S, D]; cos, sin [S, R/2] or [B or 1, S, R/2].

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "capability.h"
#include "checks.h"
#include "rotary.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

void check(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_dtype("rotary", "x", x, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  TORCH_CHECK_VALUE(x.dim() == 4, "rotary: x has ", x.dim(), " dimensions; it takes [B, H, S, D].");
  check_same_device("rotary", "cos", cos, "x", x);
  check_same_device("rotary", "sin", sin, "x", x);
  check_same_shape("rotary", "sin", sin, "cos", cos);
  const bool per_batch = cos.dim() == 3 && (cos.size(0) == x.size(0) || cos.size(0) == 1);
  TORCH_CHECK_VALUE((cos.dim() == 2 || per_batch) && cos.size(-2) == x.size(2) &&
                        2 * cos.size(-1) <= x.size(3),
                    "rotary: cos has shape ", cos.sizes(), "; beside x of shape ", x.sizes(),
                    " it takes [S, R/2] or [B, S, R/2] with R <= D.");
}

// Of x's shape, and of its layout if that has columns of stride 1.
Tensor empty_rows_like(const Tensor& x) {
  const Tensor y = at::empty_like(x);
  return x.size(-1) <= 1 || y.stride(-1) == 1 ? y : at::empty(x.sizes(), x.options());
}

Tensor rotary_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                  bool inverse) {
  check(x, cos, sin);
  const Tensor from = unit_column_stride(x), to = empty_rows_like(x);
  if (x.numel() == 0) return to;
  const auto wide = wide_of(x);
  const Tensor c = cos.to(wide).contiguous(), s = sin.to(wide).contiguous();
  Rotary args{};
  args.x = from.const_data_ptr();
  args.cos = c.const_data_ptr();
  args.sin = s.const_data_ptr();
  args.y = to.mutable_data_ptr();
  args.dtype = float_of(x);
  args.interleaved = interleaved;
  args.inverse = inverse;
  args.batch = x.size(0);
  args.heads = x.size(1);
  args.tokens = x.size(2);
  args.columns = x.size(3);
  args.half = c.size(-1);
  args.x_batch = from.stride(0);
  args.x_head = from.stride(1);
  args.x_token = from.stride(2);
  args.y_batch = to.stride(0);
  args.y_head = to.stride(1);
  args.y_token = to.stride(2);
  args.table_batch = c.dim() == 3 && c.size(0) > 1 ? c.stride(0) : 0;
  args.table_token = c.size(-1);
  TILEWISE_BEST(rotary)(args);
  return to;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) { m.impl("rotary", rotary_cpu); }

}  // namespace tilewise
