// Layer and RMS normalisation: schemas, argument checks, choice of kernel.
//
// Shapes: x, residual, grad, grad_s, s [..., N] of any strides; weight, bias [N]; mean, rstd
// [..., 1]; seed [1].

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "norm.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Outputs of this many bytes and more leave the caches before anyone reads them again.
constexpr int64_t kStreamedBytes = 4 << 20;

// ---- from tensors to kernel arguments ---------------------------------------------------------

Optional rows_if_any(const Optional& tensor) {
  return tensor ? Optional(as_rows(*tensor)) : tensor;
}

Matrix matrix_of(const Tensor& rows) { return {rows.const_data_ptr(), row_stride(rows)}; }

Matrix matrix_of(const Optional& rows) { return rows ? matrix_of(*rows) : Matrix{}; }

Optional contiguous(const Optional& tensor) {
  return tensor ? Optional(tensor->contiguous()) : tensor;
}

const void* data_of(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

void* data_of(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
}

// Whether rows of the outputs, either of which may be absent, can and should be written past the
// caches.
bool streamed(const Tensor& first, const Tensor& second, int64_t columns) {
  const auto aligned = [](const Tensor& output) {
    return reinterpret_cast<uintptr_t>(data_of(output)) % 64 == 0;
  };
  const Tensor& either = data_of(first) ? first : second;
  return either.defined() && static_cast<int64_t>(either.nbytes()) >= kStreamedBytes &&
         columns % 16 == 0 && aligned(first) && aligned(second);
}

// ---- checks -----------------------------------------------------------------------------------

constexpr const char* kOp = "norm";

void check_rows(const char* name, const Optional& tensor, const Tensor& x, const char* x_name) {
  if (!tensor) return;
  check_dtype(kOp, name, *tensor, {x.scalar_type(), wide_of(x)});
  check_same_device(kOp, name, *tensor, x_name, x);
  check_same_shape(kOp, name, *tensor, x_name, x);
}

void check_parameter(const char* name, const Optional& tensor, const Tensor& x) {
  if (!tensor) return;
  check_dtype(kOp, name, *tensor, {x.scalar_type(), wide_of(x)});
  check_same_device(kOp, name, *tensor, "x", x);
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == x.size(-1), kOp, ": ", name,
                    " has shape ", tensor->sizes(), "; it must be [", x.size(-1), "].");
}

void check_seed(const Optional& seed) {
  if (!seed) return;
  check_dtype(kOp, "seed", *seed, {at::kLong});
  TORCH_CHECK_VALUE(seed->numel() == 1, kOp, ": seed has ", seed->numel(), " elements, not 1.");
}

// ---- forward ----------------------------------------------------------------------------------

// y, s, mean and rstd; what is not wanted, or not there, is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    const Optional& seed, double eps, double dropout_p, bool rms, bool wants_sum,
    bool wants_statistics) {
  check_min_rank(kOp, "x", x, 1);
  check_dtype(kOp, "x", x, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_rows("residual", residual, x, "x");
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  check_seed(seed);
  if (weight && bias) check_same_dtype(kOp, "bias", *bias, "weight", *weight);

  const auto wide = x.options().dtype(wide_of(x));
  const auto none = [&] { return at::detail::empty_cpu({0}, x.options()); };
  at::DimVector row_shape(x.sizes());
  row_shape.back() = 1;
  const Tensor y = at::empty(x.sizes(), x.options());
  wants_sum = wants_sum && (residual || seed);
  const Tensor s =
      wants_sum ? at::empty(x.sizes(), (residual ? *residual : x).options()) : none();
  const Tensor mean = wants_statistics && !rms ? at::empty(row_shape, wide) : none();
  const Tensor rstd = wants_statistics ? at::empty(row_shape, wide) : none();
  const int64_t columns = x.size(-1);
  if (x.numel() == 0) {  // N = 0: the mean of nothing
    mean.fill_(NAN);
    rstd.fill_(NAN);
    return {y, s, mean, rstd};
  }
  const Tensor x_rows = as_rows(x);
  const Optional residual_rows = rows_if_any(residual);
  const Optional weights = contiguous(weight), biases = contiguous(bias);
  NormForward args{};
  args.x = matrix_of(x_rows);
  args.residual = matrix_of(residual_rows);
  args.weight = data_of(weights);
  args.bias = data_of(biases);
  args.y = data_of(y);
  args.s = data_of(s);
  args.mean = data_of(mean);
  args.rstd = data_of(rstd);
  args.x_type = float_of(x);
  args.s_type = float_of(residual ? *residual : x);
  args.parameter_type = float_of(weight ? *weight : bias ? *bias : x);
  args.rows = row_count(x);
  args.columns = columns;
  args.eps = eps;
  if (seed) args.dropout = dropout_of(*seed->const_data_ptr<int64_t>(), dropout_p);
  args.rms = rms;
  args.streamed = streamed(y, s, columns);
  TILEWISE_BEST(norm_forward)(args);
  return {y, s, mean, rstd};
}

// ---- backward ---------------------------------------------------------------------------------

// Gradients of x, residual, weight and bias; undefined where not wanted. Without dropout and with
// one dtype, x and residual get the same tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad, const Optional& grad_s, const Tensor& s, const Optional& weight,
    const Optional& mean, const Tensor& rstd, const Optional& seed, at::ScalarType weight_dtype,
    double dropout_p, std::array<bool, 4> needs) {
  check_min_rank(kOp, "s", s, 1);
  check_dtype(kOp, "s", s, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_dtype(kOp, "s", s, {grad.scalar_type(), wide_of(grad)});
  check_same_shape(kOp, "grad", grad, "s", s);
  check_rows("grad_s", grad_s, s, "s");
  check_parameter("weight", weight, grad);
  check_seed(seed);

  const auto [needs_x, needs_residual, needs_weight, needs_bias] = needs;
  const bool shared = grad.scalar_type() == s.scalar_type() && !seed;
  const Tensor dx = needs_x ? at::empty(s.sizes(), grad.options()) : Tensor();
  const Tensor ds = needs_residual && !(shared && needs_x) ? at::empty(s.sizes(), s.options())
                                                           : Tensor();
  const Tensor dresidual = needs_residual && !ds.defined() ? dx : ds;
  const int64_t columns = s.size(-1);
  const auto parameter = s.options().dtype(weight_dtype);
  const Tensor dweight = needs_weight ? at::empty({columns}, parameter) : Tensor();
  const Tensor dbias = needs_bias ? at::empty({columns}, parameter) : Tensor();
  if (s.numel() == 0) {
    if (needs_weight) dweight.zero_();
    if (needs_bias) dbias.zero_();
    return {dx, dresidual, dweight, dbias};
  }
  const Tensor grad_rows = as_rows(grad), s_rows = as_rows(s);
  const Optional grad_s_rows = rows_if_any(grad_s);
  const Optional weights = contiguous(weight), means = contiguous(mean);
  const Tensor rstds = rstd.contiguous();
  NormBackward args{};
  args.rows = row_count(s);
  args.columns = columns;
  args.partial_stride = (columns + 15) / 16 * 16;
  const Tensor partial = at::empty({norm_blocks(args.rows), 2, args.partial_stride},
                                   s.options().dtype(wide_of(s)));
  args.grad = matrix_of(grad_rows);
  args.grad_s = matrix_of(grad_s_rows);
  args.s = matrix_of(s_rows);
  args.weight = data_of(weights);
  args.mean = data_of(means);
  args.rstd = rstds.const_data_ptr();
  args.dx = data_of(dx);
  args.ds = data_of(ds);
  args.dweight = data_of(dweight);
  args.dbias = data_of(dbias);
  args.partial = data_of(partial);
  args.x_type = float_of(grad);
  args.s_type = float_of(s);
  args.parameter_type = float_of(weight ? *weight : needs_bias ? dbias : partial);
  if (seed) args.dropout = dropout_of(*seed->const_data_ptr<int64_t>(), dropout_p);
  args.streamed = streamed(dx, ds, columns);
  TILEWISE_BEST(norm_backward)(args);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
      "float eps, float dropout_p, bool rms, bool wants_sum, bool wants_statistics) "
      "-> (Tensor y, Tensor s, Tensor mean, Tensor rstd)");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_s, Tensor s, Tensor? weight, Tensor? mean, "
      "Tensor rstd, Tensor? seed, ScalarType weight_dtype, float dropout_p, bool[4] needs) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("norm_forward", norm_forward);
  m.impl("norm_backward", norm_backward);
}

}  // namespace tilewise
