// decode_attention: schema, argument checks, choice of kernel.
//
// Shapes: q [R, Hq, Sq, D]; k_cache, v_cache [C, Hkv, T, D]; lengths [R]; beam_index [R, T'];
// block_table [R, N]; alibi_slopes [Hq]; bias broadcasts to [R, Hq, Sq, T']. The Python front has
// checked ranks, shapes and dtypes; what the indices hold is checked here, as they are read.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "capability.h"
#include "checks.h"
#include "decode_attention.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;
constexpr const char* kOp = "decode_attention";

template <typename I>
void copy_indices(const Tensor& tensor, int64_t* out) {
  const int64_t rows = tensor.size(0), columns = tensor.dim() > 1 ? tensor.size(1) : 1;
  const int64_t across = tensor.dim() > 1 ? tensor.stride(1) : 1;
  for (int64_t r = 0; r < rows; ++r) {
    const I* const from = tensor.const_data_ptr<I>() + r * tensor.stride(0);
    for (int64_t c = 0; c < columns; ++c) *out++ = from[c * across];
  }
}

// The numbers of an index tensor [R] or [R, N], all within [0, highest].
std::vector<int64_t> indices(const char* name, const Tensor& tensor, int64_t highest) {
  check_dtype(kOp, name, tensor, {at::kInt, at::kLong});
  std::vector<int64_t> out(tensor.numel());
  if (out.empty()) return out;
  if (tensor.scalar_type() == at::kInt) {
    copy_indices<int32_t>(tensor, out.data());
  } else {
    copy_indices<int64_t>(tensor, out.data());
  }
  const auto [low, high] = std::minmax_element(out.begin(), out.end());
  TORCH_CHECK_VALUE(*low >= 0 && *high <= highest, kOp, ": ", name, " is ", *low, "..", *high,
                    "; keep it within 0..", highest);
  return out;
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_unit_stride(const char* name, const Tensor& cache) {
  TORCH_CHECK_VALUE(cache.stride(3) == 1, kOp, ": ", name, " has strides ", cache.strides(),
                    "; the last must be 1. Pass ", name, ".contiguous().");
}

Tensor decode_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& lengths, const std::optional<Tensor>& beam_index,
                            const std::optional<Tensor>& block_table, double scale,
                            const std::optional<Tensor>& alibi_slopes, int64_t left,
                            const std::optional<Tensor>& bias) {
  check_dtype(kOp, "q", q, {at::kFloat, at::kBFloat16, at::kHalf});
  check_unit_stride("k_cache", k_cache);
  check_unit_stride("v_cache", v_cache);
  const Tensor& k = k_cache;
  const Tensor& v = v_cache;
  const Tensor rows_q = unit_column_stride(q);
  DecodeAttention args{};
  args.lookup = beam_index ? Lookup::beam : block_table ? Lookup::page : Lookup::own;
  args.page_size = k.size(2);
  int64_t capacity = k.size(2);
  std::vector<int64_t> table;
  if (beam_index || block_table) {
    const Tensor& given = beam_index ? *beam_index : *block_table;
    table = indices(beam_index ? "beam_index" : "block_table", given, k.size(0) - 1);
    args.table_width = given.size(1);
    capacity = args.table_width * (beam_index ? 1 : args.page_size);
  }
  const std::vector<int64_t> used = indices("lengths", lengths, capacity);
  TORCH_CHECK_VALUE(k.size(1) == 0 || q.size(1) / k.size(1) * q.size(2) <= kMaxShared, kOp,
                    ": q has ", q.size(1), " heads of ", q.size(2), " queries for ", k.size(1),
                    " key heads; at most ", kMaxShared, " may share one.");
  args.longest = used.empty() ? 0 : *std::max_element(used.begin(), used.end());
  if (q.numel() == 0 || args.longest == 0) return at::zeros(q.sizes(), q.options());
  const Tensor out = at::empty(q.sizes(), q.options());

  args.q = rows_q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.dtype = float_of(q);
  args.rows = q.size(0);
  args.kv_heads = k.size(1);
  args.group = q.size(1) / k.size(1);
  args.queries = q.size(2);
  args.head_dim = q.size(3);
  args.q_stride = strides_of(rows_q);
  args.k_stride = strides_of(k);
  args.v_stride = strides_of(v);
  args.lengths = used.data();
  args.table = table.data();
  args.left = left;
  args.scale = static_cast<float>(scale);
  Tensor slopes, added;
  if (alibi_slopes) {
    slopes = alibi_slopes->to(at::kFloat).contiguous();
    args.alibi_slopes = slopes.const_data_ptr<float>();
  }
  if (bias) {
    added = bias->to(at::kFloat).expand({q.size(0), q.size(1), q.size(2), capacity});
    args.bias = added.const_data_ptr<float>();
    std::copy_n(added.strides().begin(), 4, args.bias_stride);
  }
  TILEWISE_BEST(decode_attention)(args);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? beam_index, Tensor? block_table, float scale, Tensor? alibi_slopes, int left, "
      "Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) { m.impl("decode_attention", decode_attention_cpu); }

}  // namespace tilewise
