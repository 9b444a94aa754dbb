// cross_entropy on the CPU: schemas, argument checks, reduction.
//
// Shapes: logits and dlogits [..., V]; target and losses [...]; statistics [..., 2]; weight [] or
// [...]. Losses, statistics and weight are float32, or float64 for float64 logits.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "capability.h"
#include "checks.h"
#include "cross_entropy.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

void check(const Tensor& logits, const Tensor& target) {
  constexpr auto op = "cross_entropy";
  check_min_rank(op, "logits", logits, 1);
  check_dtype(op, "logits", logits, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  TORCH_CHECK_VALUE(logits.size(-1) > 0, op, ": logits have no classes; pass 1 or more columns.");
  check_dtype(op, "target", target, {at::kLong});
  check_same_device(op, "target", target, "logits", logits);
  TORCH_CHECK_VALUE(target.sizes() == logits.sizes().slice(0, logits.dim() - 1), op,
                    ": target has shape ", target.sizes(), " but logits have ", logits.sizes(),
                    "; target must have all dimensions of the logits but the last.");
}

// How many targets are not ignored, at least 1; raises where one is out of range.
int64_t counted(const Tensor& target, int64_t columns, int64_t ignored) {
  const int64_t* const values = target.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < target.numel(); ++i) {
    if (values[i] == ignored) continue;
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < columns, "cross_entropy: target holds ",
                      values[i], " at flat position ", i, "; it takes 0 to ", columns - 1,
                      " (the logits' last dimension is ", columns, ") or the ignore_index ",
                      ignored, ".");
    ++count;
  }
  return std::max<int64_t>(count, 1);
}

CrossEntropy args_of(const Tensor& rows, const Tensor& target, int64_t ignored, double smoothing,
                     double z) {
  CrossEntropy args{};
  args.logits = rows.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  args.dtype = float_of(rows);
  args.rows = row_count(rows);
  args.columns = rows.size(-1);
  args.stride = row_stride(rows);
  args.ignored = ignored;
  args.smoothing = smoothing;
  args.z = z;
  args.divisor = 1;
  return args;
}

template <typename A>
Tensor sum_of(const Tensor& losses, int64_t divisor) {
  const A* const values = losses.const_data_ptr<A>();
  double sum = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += values[i];
  Tensor result = at::empty({}, losses.options());
  *result.mutable_data_ptr<A>() = static_cast<A>(sum / static_cast<double>(divisor));
  return result;
}

// loss, [...] or [], and statistics [..., 2]
std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, int64_t ignored,
                                   double smoothing, double z, c10::string_view reduction) {
  check(logits, target);
  const Tensor labels = target.contiguous(), rows = as_rows(logits);
  const int64_t count = counted(labels, logits.size(-1), ignored);
  const auto wide = logits.options().dtype(wide_of(logits));
  const Tensor losses = at::empty(target.sizes(), wide);
  std::vector<int64_t> shape = target.sizes().vec();
  shape.push_back(2);
  const Tensor statistics = at::empty(shape, wide);
  if (rows.numel() > 0) {
    CrossEntropy args = args_of(rows, labels, ignored, smoothing, z);
    args.losses = losses.mutable_data_ptr();
    args.statistics = statistics.mutable_data_ptr();
    TILEWISE_BEST(cross_entropy)(args);
  }
  if (reduction == "none") return {losses, statistics};
  const int64_t divisor = reduction == "mean" ? count : 1;
  const bool twice = wide_of(logits) == at::kDouble;
  return {twice ? sum_of<double>(losses, divisor) : sum_of<float>(losses, divisor), statistics};
}

// grad: of the loss, so [...] or [].
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                const Tensor& statistics, int64_t ignored, double smoothing, double z,
                c10::string_view reduction) {
  check(logits, target);
  check_dtype("cross_entropy", "grad", grad, {wide_of(logits)});
  const Tensor dlogits = at::empty(logits.sizes(), logits.options());
  if (dlogits.numel() == 0) return dlogits;
  const Tensor labels = target.contiguous(), weights = grad.contiguous();
  const Tensor rows = as_rows(logits), kept = statistics.contiguous();
  CrossEntropy args = args_of(rows, labels, ignored, smoothing, z);
  args.statistics = kept.data_ptr();
  args.dlogits = dlogits.mutable_data_ptr();
  args.weight = weights.const_data_ptr();
  args.weight_stride = reduction == "none" ? 1 : 0;
  if (reduction == "mean") args.divisor = counted(labels, logits.size(-1), ignored);
  TILEWISE_BEST(cross_entropy)(args);
  return dlogits;
}

// The losses [M] of logits [M, V], whose place their weighted gradient takes.
Tensor in_place(Tensor& logits, const Tensor& target, const Tensor& weight, int64_t ignored,
                double smoothing, double z) {
  check(logits, target);
  check_dtype("cross_entropy", "weight", weight, {wide_of(logits)});
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous(),
                    "cross_entropy: logits written in place must be a contiguous matrix.");
  const Tensor labels = target.contiguous(), weights = weight.contiguous();
  counted(labels, logits.size(-1), ignored);
  const Tensor losses = at::empty(target.sizes(), logits.options().dtype(wide_of(logits)));
  if (logits.numel() == 0) return losses.zero_();
  CrossEntropy args = args_of(logits, labels, ignored, smoothing, z);
  args.losses = losses.mutable_data_ptr();
  args.dlogits = logits.mutable_data_ptr();
  args.weight = weights.const_data_ptr();
  args.weight_stride = weight.dim() == 0 ? 0 : 1;
  TILEWISE_BEST(cross_entropy)(args);
  return losses;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, int ignored, float smoothing, float z, "
      "str reduction) -> (Tensor loss, Tensor statistics)");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor statistics, "
      "int ignored, float smoothing, float z, str reduction) -> Tensor");
  m.def(
      "cross_entropy_in_place(Tensor(a!) logits, Tensor target, Tensor weight, int ignored, "
      "float smoothing, float z) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("cross_entropy_forward", forward);
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_in_place", in_place);
}

}  // namespace tilewise
