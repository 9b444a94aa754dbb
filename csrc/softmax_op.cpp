// softmax: schema, argument checks, choice of kernel.
//
// Shapes: x, grad and y are [..., Sq, N]; the outer dimensions may have any strides.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "capability.h"
#include "checks.h"
#include "rows.h"
#include "softmax.h"

#ifdef TILEWISE_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#endif

namespace tilewise {
namespace {

using at::Tensor;

// ---- from tensors to kernel arguments ---------------------------------------------------------

Mask mask_kind_of(const std::optional<Tensor>& mask, const Tensor& x) {
  if (!mask) return Mask::none;
  if (mask->scalar_type() == at::kBool) return Mask::boolean;
  return mask->scalar_type() == at::kFloat ? Mask::f32 : Mask::same_as_x;
}

// The outer dimensions of two tensors of one shape, merged where both strides allow it.
Rows rows_of(const char* op, const Tensor& a, const Tensor& b) {
  Rows rows;
  for (int64_t d = a.dim() - 2; d >= 0; --d) {
    if (a.size(d) == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && a.stride(d) == rows.stride[0][last] * rows.size[last] &&
        b.stride(d) == rows.stride[1][last] * rows.size[last]) {
      rows.size[last] *= a.size(d);
      continue;
    }
    TORCH_CHECK_VALUE(rows.dims < kMaxOuterDims, op, ": the strides of shape ", a.sizes(),
                      " do not merge into ", kMaxOuterDims,
                      " outer dimensions. Call .contiguous() on the inputs first.");
    rows.size[rows.dims] = a.size(d);
    rows.stride[0][rows.dims] = a.stride(d);
    rows.stride[1][rows.dims] = b.stride(d);
    ++rows.dims;
  }
  return rows;
}

void check_forward(const Tensor& x, const std::optional<Tensor>& mask) {
  check_min_rank("softmax", "x", x, 1);
  check_dtype("softmax", "x", x, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  if (!mask) return;
  check_same_device("softmax", "mask", *mask, "x", x);
  check_dtype("softmax", "mask", *mask, {at::kBool, at::kFloat, x.scalar_type()});
  check_broadcastable("softmax", "mask", *mask, "x", x);
}

void check_backward(const Tensor& grad, const Tensor& y) {
  check_min_rank("softmax backward", "y", y, 1);
  check_dtype("softmax backward", "y", y, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_same_device("softmax backward", "grad", grad, "y", y);
  check_same_dtype("softmax backward", "grad", grad, "y", y);
  check_same_shape("softmax backward", "grad", grad, "y", y);
}

SoftmaxForward forward_args(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& y,
                            double scale, bool causal) {
  const Tensor spread = mask ? mask->expand_as(x) : x;
  SoftmaxForward args{};
  args.x = x.const_data_ptr();
  args.mask = spread.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.dtype = float_of(x);
  args.mask_kind = mask_kind_of(mask, x);
  args.columns = x.size(-1);
  args.num_rows = x.numel() / args.columns;
  args.queries = x.dim() > 1 ? x.size(-2) : 1;
  args.x_column_stride = x.stride(-1);
  args.mask_column_stride = spread.stride(-1);
  args.rows = rows_of("softmax", x, spread);
  args.scale = scale;
  args.causal = causal;
  return args;
}

SoftmaxBackward backward_args(const Tensor& grad, const Tensor& y, const Tensor& dx,
                              double scale) {
  SoftmaxBackward args{};
  args.grad = grad.const_data_ptr();
  args.y = y.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.dtype = float_of(y);
  args.columns = y.size(-1);
  args.num_rows = y.numel() / args.columns;
  args.grad_column_stride = grad.stride(-1);
  args.rows = rows_of("softmax backward", grad, grad);
  args.scale = scale;
  return args;
}

// ---- CPU --------------------------------------------------------------------------------------

Tensor softmax_forward_cpu(const Tensor& x, const std::optional<Tensor>& mask, double scale,
                           bool causal) {
  check_forward(x, mask);
  const Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() > 0) TILEWISE_BEST(softmax_forward)(forward_args(x, mask, y, scale, causal));
  return y;
}

Tensor softmax_backward_cpu(const Tensor& grad, const Tensor& y, double scale) {
  check_backward(grad, y);
  const Tensor dx = at::empty(y.sizes(), y.options());
  if (dx.numel() == 0) return dx;
  const Tensor y_rows = y.contiguous();
  TILEWISE_BEST(softmax_backward)(backward_args(grad, y_rows, dx, scale));
  return dx;
}

// ---- CUDA -------------------------------------------------------------------------------------

#ifdef TILEWISE_WITH_CUDA
// The current stream without a CUDA header, so that this path compiles against a CPU torch too.
void* current_stream(const Tensor& tensor) {
  const c10::impl::VirtualGuardImpl guard(tensor.device().type());
  return guard.getStreamNativeHandle(guard.getStream(tensor.device()));
}

void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": the CUDA kernel did not launch: ", error);
}

Tensor softmax_forward_cuda(const Tensor& x, const std::optional<Tensor>& mask, double scale,
                            bool causal) {
  check_forward(x, mask);
  const c10::DeviceGuard device(x.device());
  const Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const Tensor x_rows = unit_column_stride(x);
  const SoftmaxForward args = forward_args(x_rows, mask, y, scale, causal);
  check_launch("softmax", cuda::softmax_forward(args, current_stream(x)));
  return y;
}

Tensor softmax_backward_cuda(const Tensor& grad, const Tensor& y, double scale) {
  check_backward(grad, y);
  const c10::DeviceGuard device(y.device());
  const Tensor dx = at::empty(y.sizes(), y.options());
  if (dx.numel() == 0) return dx;
  const Tensor grad_rows = unit_column_stride(grad);
  const Tensor y_rows = y.contiguous();
  const SoftmaxBackward args = backward_args(grad_rows, y_rows, dx, scale);
  check_launch("softmax backward", cuda::softmax_backward(args, current_stream(y)));
  return dx;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("softmax_forward(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor y, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("softmax_forward", softmax_forward_cpu);
  m.impl("softmax_backward", softmax_backward_cpu);
}

#ifdef TILEWISE_WITH_CUDA
TORCH_LIBRARY_IMPL(tilewise_native, CUDA, m) {
  m.impl("softmax_forward", softmax_forward_cuda);
  m.impl("softmax_backward", softmax_backward_cuda);
}
#endif

}  // namespace tilewise
