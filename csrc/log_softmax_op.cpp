// log_softmax and log_softmax_topk on the CPU: schemas and argument checks.
//
// Shapes: x, grad, y and dx [..., V]; scores and ids [..., k].

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "capability.h"
#include "checks.h"
#include "log_softmax.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

void check_rows(const char* op, const char* name, const Tensor& tensor) {
  check_min_rank(op, name, tensor, 1);
  check_dtype(op, name, tensor, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
}

Tensor log_softmax_forward_cpu(const Tensor& x) {
  check_rows("log_softmax", "x", x);
  const Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const Tensor rows = as_rows(x);
  TILEWISE_BEST(log_softmax_forward)({rows.const_data_ptr(), y.mutable_data_ptr(),
                                      float_of(x), row_count(x), x.size(-1),
                                      row_stride(rows)});
  return y;
}

Tensor log_softmax_backward_cpu(const Tensor& grad, const Tensor& y) {
  constexpr auto op = "log_softmax backward";
  check_rows(op, "y", y);
  check_same_dtype(op, "grad", grad, "y", y);
  check_same_shape(op, "grad", grad, "y", y);
  const Tensor dx = at::empty(y.sizes(), y.options());
  if (dx.numel() == 0) return dx;
  const Tensor grads = as_rows(grad), values = y.contiguous();
  TILEWISE_BEST(log_softmax_backward)({grads.const_data_ptr(), values.const_data_ptr(),
                                       dx.mutable_data_ptr(), float_of(y), row_count(y),
                                       y.size(-1), row_stride(grads)});
  return dx;
}

std::tuple<Tensor, Tensor> log_softmax_topk_cpu(const Tensor& x, int64_t k) {
  constexpr auto op = "log_softmax_topk";
  check_rows(op, "x", x);
  TORCH_CHECK_VALUE(k >= 1 && k <= x.size(-1), op, ": k is ", k, " but x has ", x.size(-1),
                    " columns; pass 1 to that many.");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = k;
  const Tensor scores = at::empty(shape, x.options().dtype(wide_of(x)));
  const Tensor ids = at::empty(shape, x.options().dtype(at::kLong));
  if (x.numel() == 0) return {scores, ids};
  const Tensor rows = as_rows(x);
  TILEWISE_BEST(log_softmax_topk)({rows.const_data_ptr(), scores.mutable_data_ptr(),
                                   ids.mutable_data_ptr<int64_t>(), float_of(x), row_count(x),
                                   x.size(-1), row_stride(rows), k});
  return {scores, ids};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("log_softmax_forward(Tensor x) -> Tensor");
  m.def("log_softmax_backward(Tensor grad, Tensor y) -> Tensor");
  m.def("log_softmax_topk(Tensor x, int k) -> (Tensor scores, Tensor ids)");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("log_softmax_forward", log_softmax_forward_cpu);
  m.impl("log_softmax_backward", log_softmax_backward_cpu);
  m.impl("log_softmax_topk", log_softmax_topk_cpu);
}

}  // namespace tilewise
