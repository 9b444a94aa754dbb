// Activation, gate and dropout between two products: schema, argument checks, choice of kernel.
//
// Shapes: all tensors are [..., F], contiguous, of one shape and dtype; seed is int64 [1].

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "activation.h"
#include "capability.h"
#include "checks.h"

namespace tilewise {
namespace {

using at::Tensor;

Act act_of(std::string_view name) {
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "relu") return Act::relu;
  if (name == "silu") return Act::silu;
  if (name == "quick_gelu") return Act::quick_gelu;
  TORCH_CHECK_VALUE(name == "identity", "activation: there is no '", std::string(name), "'.");
  return Act::identity;
}

void check_like(const char* name, const Tensor& tensor, const Tensor& h) {
  check_same_device("activation", name, tensor, "h", h);
  check_same_dtype("activation", name, tensor, "h", h);
  check_same_shape("activation", name, tensor, "h", h);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "activation: ", name, " is not contiguous.");
}

void* writable(const char* name, const std::optional<Tensor>& tensor, const Tensor& h) {
  if (!tensor) return nullptr;
  check_like(name, *tensor, h);
  return tensor->mutable_data_ptr();
}

Activation arguments(const Tensor& h, const std::optional<Tensor>& g,
                     const std::optional<Tensor>& seed, std::string_view activation, double p,
                     const std::optional<Tensor>& a) {
  check_min_rank("activation", "h", h, 1);
  check_dtype("activation", "h", h, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_like("h", h, h);
  if (g) check_like("g", *g, h);
  Activation args{};
  args.h = h.const_data_ptr();
  args.g = g ? g->const_data_ptr() : nullptr;
  args.a = writable("a", a, h);
  args.dtype = float_of(h);
  args.act = act_of(activation);
  args.columns = h.size(-1);
  args.rows = args.columns == 0 ? 0 : h.numel() / args.columns;
  if (seed) {
    check_dtype("activation", "seed", *seed, {at::kLong});
    TORCH_CHECK_VALUE(seed->numel() == 1, "activation: seed has ", seed->numel(), " numbers.");
    args.dropout = dropout_of(*seed->const_data_ptr<int64_t>(), p);
  }
  return args;
}

void activation_cpu(const Tensor& h, const std::optional<Tensor>& g,
                    const std::optional<Tensor>& seed, std::string_view activation, double p,
                    const Tensor& a) {
  TILEWISE_BEST(activation)(arguments(h, g, seed, activation, p, a));
}

void activation_backward_cpu(const Tensor& da, const Tensor& h, const std::optional<Tensor>& g,
                             const std::optional<Tensor>& seed, std::string_view activation,
                             double p, const Tensor& dh, const std::optional<Tensor>& dg,
                             const std::optional<Tensor>& a) {
  ActivationBackward args{};
  args.forward = arguments(h, g, seed, activation, p, a);
  check_like("da", da, h);
  args.da = da.const_data_ptr();
  args.dh = writable("dh", dh, h);
  args.dg = writable("dg", dg, h);
  TILEWISE_BEST(activation_backward)(args);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("activation(Tensor h, Tensor? g, Tensor? seed, str activation, float p, Tensor(a!) a) "
        "-> ()");
  m.def("activation_backward(Tensor da, Tensor h, Tensor? g, Tensor? seed, str activation, "
        "float p, Tensor(a!) dh, Tensor(b!)? dg, Tensor(c!)? a) -> ()");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("activation", activation_cpu);
  m.impl("activation_backward", activation_backward_cpu);
}

}  // namespace tilewise
