// AdamW over lists of tensors: schema, argument checks, choice of kernel.
//
// All tensors of one place in the lists have one shape and are contiguous.

#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "adamw.h"
#include "capability.h"
#include "checks.h"

namespace tilewise {
namespace {

using at::Tensor;

void check(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v,
           const Tensor& master) {
  check_dtype("adamw", "param", param, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_same_dtype("adamw", "grad", grad, "param", param);
  check_dtype("adamw", "exp_avg", m, {param.scalar_type(), at::kFloat});
  check_same_dtype("adamw", "exp_avg_sq", v, "exp_avg", m);
  for (const Tensor* each : {&grad, &m, &v}) {
    check_same_shape("adamw", "a gradient or moment", *each, "its parameter", param);
    TORCH_CHECK_VALUE(each->is_contiguous() && param.is_contiguous(), "adamw: not contiguous.");
  }
  if (master.numel() > 0) {
    check_same_shape("adamw", "master", master, "its parameter", param);
    check_dtype("adamw", "master", master, {at::kFloat});
    TORCH_CHECK_VALUE(master.is_contiguous(), "adamw: master is not contiguous.");
  }
}

Tensor grad_norm_cpu(const std::vector<Tensor>& grads) {
  double sum = 0;
  for (const Tensor& grad : grads) {
    check_dtype("adamw", "grad", grad, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
    TORCH_CHECK_VALUE(grad.is_contiguous(), "adamw: grad is not contiguous.");
    sum += TILEWISE_BEST(sum_of_squares)(grad.const_data_ptr(), float_of(grad), grad.numel());
  }
  return at::scalar_tensor(std::sqrt(sum), at::kDouble);
}

// coefficients: double [3]: lr / (1 - beta1^t), sqrt(1 - beta2^t), and what gradients are multiplied
// with. An empty master means none.
void adamw_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
               const std::vector<Tensor>& masters, const Tensor& coefficients, double beta1,
               double beta2, double eps, double decay) {
  check_dtype("adamw", "coefficients", coefficients, {at::kDouble});
  TORCH_CHECK_VALUE(coefficients.numel() == 3 && coefficients.is_contiguous(),
                    "adamw: coefficients has shape ", coefficients.sizes(), "; it takes [3].");
  const double* const given = coefficients.const_data_ptr<double>();
  for (size_t i = 0; i < params.size(); ++i) {
    check(params[i], grads.at(i), exp_avgs.at(i), exp_avg_sqs.at(i), masters.at(i));
    AdamW args{};
    args.param = params[i].mutable_data_ptr();
    args.grad = grads[i].const_data_ptr();
    args.m = exp_avgs[i].mutable_data_ptr();
    args.v = exp_avg_sqs[i].mutable_data_ptr();
    args.master = masters[i].numel() > 0 ? masters[i].mutable_data_ptr<float>() : nullptr;
    args.dtype = float_of(params[i]);
    args.moment_dtype = float_of(exp_avgs[i]);
    args.size = params[i].numel();
    args.beta1 = beta1;
    args.beta2 = beta2;
    args.eps = eps;
    args.decay = decay;
    args.step_size = given[0];
    args.root = given[1];
    args.grad_scale = given[2];
    TILEWISE_BEST(adamw)(args);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def("adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor coefficients, float beta1, "
        "float beta2, float eps, float decay) -> ()");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("grad_norm", grad_norm_cpu);
  m.impl("adamw", adamw_cpu);
}

}  // namespace tilewise
