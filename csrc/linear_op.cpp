// linear with a packed weight: schema, argument checks, choice of kernel.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "capability.h"
#include "checks.h"
#include "linear.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

bool runs(at::ScalarType dtype) { return TILEWISE_BEST(linear_runs)(dtype); }

void check(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& bias, int64_t n) {
  check_min_rank("linear", "x", x, 1);
  check_dtype("linear", "x", x, {at::kFloat, at::kBFloat16, at::kHalf});
  check_dtype("linear", "panels", panels, {at::kFloat, at::kBFloat16, at::kChar});
  TORCH_CHECK_VALUE(runs(panels.scalar_type()), "linear: this CPU has no kernel for panels of ",
                    panels.scalar_type(), ". Pack the weight again here.");
  TORCH_CHECK_VALUE(x.size(-1) > 0, "linear: x has no columns to multiply; pass 1 or more.");
  const int64_t g = per_word(panels.scalar_type());
  const int64_t shape[] = {(n + kPanel - 1) / kPanel, 1 + (x.size(-1) + g - 1) / g, kPanel, g};
  TORCH_CHECK_VALUE(n >= 0 && panels.sizes() == at::IntArrayRef(shape) && panels.is_contiguous(),
                    "linear: panels have shape ", panels.sizes(), "; for x of ", x.size(-1),
                    " and y of ", n, " columns they must be ", at::IntArrayRef(shape),
                    " and contiguous.");
  TORCH_CHECK_VALUE(scale.has_value() == (panels.scalar_type() == at::kChar),
                    "linear: panels of int8 take a scale, the others none.");
  for (const auto& each : {scale, bias}) {
    if (!each) continue;
    TORCH_CHECK_VALUE(each->dim() == 1 && each->size(0) == n && each->is_contiguous() &&
                          each->scalar_type() == at::kFloat,
                      "linear: scale and bias must be float32 [", n, "] and contiguous.");
  }
}

Tensor linear_cpu(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& bias, int64_t n) {
  check(x, panels, scale, bias, n);
  at::DimVector shape(x.sizes());
  shape.back() = n;
  const Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const int64_t k = x.size(-1);
  const Tensor rows = as_rows(x);
  Linear args{};
  args.x = rows.const_data_ptr();
  args.panels = panels.const_data_ptr();
  args.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  args.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  args.y = y.mutable_data_ptr();
  args.x_dtype = x.scalar_type();
  args.dtype = panels.scalar_type();
  args.m = row_count(x);
  args.k = k;
  args.n = n;
  args.x_stride = row_stride(rows);
  Tensor room;  // [M, S] words, then [M] row scales
  if (!reads_x_in_place(args)) {
    room = at::empty({args.m * panels.size(1)}, x.options().dtype(at::kInt));
    args.words = room.mutable_data_ptr<int32_t>();
    const int64_t words = panels.size(1) - 1;
    args.row_scale = reinterpret_cast<float*>(args.words + args.m * words);
  }
  TILEWISE_BEST(linear)(args);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("linear_runs(ScalarType dtype) -> bool", runs);
  m.def("linear(Tensor x, Tensor panels, Tensor? scale, Tensor? bias, int n) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) { m.impl("linear", linear_cpu); }

}  // namespace tilewise
