// AdamW over lists of tensors: schemas, argument checks, choice of kernel.
//
// A place is what stands at one index of the lists: a parameter, its gradient, both moments and
// perhaps its master. All of it has one shape.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "adamw.h"
#include "capability.h"
#include "checks.h"

namespace tilewise {
namespace {

using at::Tensor;
using at::TensorList;

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

// ---- whether a call is as calls usually are -----------------------------------------------

bool is_float_tensor(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() &&
         (is_half(tensor) || tensor.scalar_type() == at::kFloat ||
          tensor.scalar_type() == at::kDouble);
}

// Whether no element is part of two tensors, which are all dense.
bool are_apart(std::vector<std::pair<const char*, const char*>>& spans) {
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return false;
  }
  return true;
}

// What the Python checks would let pass, told in a hundredth of their time; false where they must
// look closer. The tensors are on one device, dense and apart, their shapes and dtypes fit.
bool adamw_usual(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                 TensorList masters) {
  const size_t count = params.size();
  if (grads.size() != count || exp_avgs.size() != count || exp_avg_sqs.size() != count ||
      !(masters.empty() || masters.size() == count)) {
    return false;
  }
  std::vector<std::pair<const char*, const char*>> spans;
  spans.reserve(5 * count);
  const auto fits = [&](const Tensor& tensor, const Tensor& param) {
    if (!is_float_tensor(tensor) || tensor.device() != params[0].device() ||
        tensor.sizes() != param.sizes() || !tensor.is_non_overlapping_and_dense() ||
        tensor.is_neg() || tensor.is_inference()) {
      return false;
    }
    const auto* const from = static_cast<const char*>(tensor.const_data_ptr());
    if (tensor.numel() > 0) spans.emplace_back(from, from + tensor.nbytes());
    return true;
  };
  for (size_t i = 0; i < count; ++i) {
    const Tensor &param = params[i], &m = exp_avgs[i];
    for (const Tensor* each : {&param, &grads[i], &m, &exp_avg_sqs[i]}) {
      if (!fits(*each, param)) return false;
    }
    const auto dtype = param.scalar_type();
    if (grads[i].scalar_type() != dtype || exp_avg_sqs[i].scalar_type() != m.scalar_type() ||
        !(m.scalar_type() == dtype || (is_half(param) && m.scalar_type() == at::kFloat))) {
      return false;
    }
    if (!masters.empty() && !(fits(masters[i], param) && is_half(param) &&
                              masters[i].scalar_type() == at::kFloat)) {
      return false;
    }
  }
  return are_apart(spans);
}

// ---- the step ----------------------------------------------------------------------------------

void check(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v,
           const Tensor* master) {
  check_dtype("adamw", "param", param, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  check_same_dtype("adamw", "grad", grad, "param", param);
  if (is_half(param)) {
    check_dtype("adamw", "exp_avg", m, {param.scalar_type(), at::kFloat});
  } else {
    check_same_dtype("adamw", "exp_avg", m, "param", param);
  }
  check_same_dtype("adamw", "exp_avg_sq", v, "exp_avg", m);
  for (const Tensor* each : {&grad, &m, &v}) {
    check_same_shape("adamw", "a gradient or moment", *each, "its parameter", param);
  }
  if (master != nullptr) {
    check_same_shape("adamw", "master", *master, "its parameter", param);
    check_dtype("adamw", "master", *master, {at::kFloat});
    check_dtype("adamw", "param with a master", param, {at::kBFloat16, at::kHalf});
  }
}

// Places as the kernels take them. Where the tensors of a place do not lie in memory in one order,
// contiguous copies stand in for them.
class Places {
 public:
  void add(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v,
           const Tensor* master) {
    one_order_ = param.is_non_overlapping_and_dense();
    for (const Tensor* each : {&grad, &m, &v, master}) {
      one_order_ = one_order_ && (each == nullptr || each->strides() == param.strides());
    }
    AdamWPlace place{};
    place.grad = laid_out(grad, read_).const_data_ptr();
    place.param = laid_out(param, written_).mutable_data_ptr();
    place.m = laid_out(m, written_).mutable_data_ptr();
    place.v = laid_out(v, written_).mutable_data_ptr();
    if (master != nullptr) place.master = laid_out(*master, written_).mutable_data_ptr<float>();
    place.dtype = float_of(param);
    place.moment_dtype = float_of(m);
    place.size = param.numel();
    place.start = all.empty() ? 0 : all.back().start + all.back().size;
    all.push_back(place);
  }

  void copy_back() const {
    for (const auto& [given, copy] : written_) given.copy_(copy);
  }

  std::vector<AdamWPlace> all;

 private:
  using Copies = std::vector<std::pair<Tensor, Tensor>>;

  const Tensor& laid_out(const Tensor& tensor, Copies& copies) const {
    if (one_order_ || tensor.is_contiguous()) return tensor;
    return copies.emplace_back(tensor, tensor.contiguous()).second;
  }

  bool one_order_ = true;
  Copies read_, written_;
};

// coefficients: double [3]: lr / (1 - beta1^t), sqrt(1 - beta2^t), and what gradients are
// multiplied with. masters: none, or one for each parameter, where an empty one means none. Returns
// the norm of the gradients, so multiplied, if there is a max_norm.
Tensor adamw_cpu(const Tensor& coefficients, TensorList params, TensorList grads,
                 TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, double beta1,
                 double beta2, double eps, double decay, std::optional<double> max_norm) {
  check_dtype("adamw", "coefficients", coefficients, {at::kDouble});
  TORCH_CHECK_VALUE(coefficients.numel() == 3 && coefficients.is_contiguous(),
                    "adamw: coefficients has shape ", coefficients.sizes(), "; it takes [3].");
  for (const TensorList each : {grads, exp_avgs, exp_avg_sqs, masters.empty() ? params : masters}) {
    TORCH_CHECK_VALUE(each.size() == params.size(), "adamw: a list holds ", each.size(),
                      " tensors; params holds ", params.size(), ".");
  }
  const auto master_of = [&](size_t i) {
    return masters.empty() || masters[i].numel() == 0 ? nullptr : &masters[i];
  };
  for (size_t i = 0; i < params.size(); ++i) {
    check(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], master_of(i));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  for (const TensorList each : {params, exp_avgs, exp_avg_sqs, masters}) {
    for (const Tensor& tensor : each) tensor.unsafeGetTensorImpl()->bump_version();
  }
  Places places;
  places.all.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    places.add(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], master_of(i));
  }
  const auto count = static_cast<int64_t>(places.all.size());
  const double* const given = coefficients.const_data_ptr<double>();
  AdamW how{beta1, beta2, eps, decay, given[0], given[1], given[2]};
  Tensor norm;
  if (max_norm) {
    const double sum = TILEWISE_BEST(sum_of_squares)(places.all.data(), count);
    const double found = std::sqrt(sum) * how.grad_scale;
    const double clip = *max_norm / (found + 1e-6);
    if (!(clip >= 1)) how.grad_scale *= clip;  // NaN too
    norm = at::scalar_tensor(found, at::kFloat);
  } else {
    norm = at::empty({0}, at::kFloat);
  }
  TILEWISE_BEST(adamw)(places.all.data(), count, how);
  places.copy_back();
  return norm;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("adamw_usual(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
        "Tensor[] masters) -> bool", adamw_usual);
  m.def("adamw(Tensor coefficients, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, float beta1, float beta2, float eps, "
        "float decay, float? max_norm) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("adamw", adamw_cpu);
}

}  // namespace tilewise
