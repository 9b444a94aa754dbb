// attention: schemas, choice of kernel. The Python front has checked shapes, dtypes and lengths.
//
// Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; lse [B, Hq, Sq]. Packed: q
// [Tq, Hq, D]; k [Tk, Hkv, D]; v [Tk, Hkv, Dv]; lse [Hq, Tq]; seen as a batch of one.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "capability.h"
#include "checks.h"
#include "dropout.h"

namespace tilewise {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// ---- can it run -------------------------------------------------------------------------------

// Whether torch multiplies tiles of T here, and gets it right: 16 x 16 ones are 16.
template <typename T>
bool multiplies() {
  std::vector<T> ones(256, T(1.0f));
  std::vector<float> c(256, 0.0f);
  const bool words = sizeof(T) == 2;
  try {
    at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, ones.data(), ones.data(), c.data(),
                                words);
    at::native::cpublas::brgemm_release(words);
  } catch (const std::exception&) {  // what it lacks is the answer
    return false;
  }
  return std::all_of(c.begin(), c.end(), [](float x) { return x == 16.0f; });
}

bool multiplies_bfloat16() {
#ifdef TILEWISE_WITH_X86  // without the instructions it would be slower than float32
  const bool fast = __builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16");
  return fast && multiplies<at::BFloat16>();
#else
  return false;
#endif
}

bool attention_runs(at::ScalarType dtype) {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool f32 = multiplies<float>(), bf16 = multiplies_bfloat16();
  return (dtype == at::kFloat && f32) || (dtype == at::kBFloat16 && bf16);
}

// ---- from tensors to kernel arguments ---------------------------------------------------------

struct Scoring {
  const Optional &mask, &bias, &key_lengths, &slopes, &seed;
  bool causal;
  int64_t left, right;
  double softcap, scale, dropout_p;
};

// [T, heads, width] as [1, heads, T, width].
Tensor batch_of_one(const Tensor& packed) { return packed.transpose(0, 1).unsqueeze(0); }

// Rows of numbers that lie together.
Tensor together(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

Tensor empty_together(const Tensor& x) {
  const Tensor like = at::empty_like(x);
  return x.size(-1) <= 1 || like.stride(-1) == 1 ? like : at::empty(x.sizes(), x.options());
}

Matrices matrices(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Term term_of(const Optional& term) {
  if (!term) return {};
  Added kind = Added::f32;
  if (term->scalar_type() == at::kBool) kind = Added::boolean;
  if (term->scalar_type() == at::kBFloat16) kind = Added::bf16;
  if (term->scalar_type() == at::kHalf) kind = Added::f16;
  const auto stride = [&](int64_t dim) { return term->size(dim) == 1 ? 0 : term->stride(dim); };
  return {term->const_data_ptr(), kind, stride(0), stride(1), stride(2), stride(3)};
}

std::vector<Item> batch_items(const Tensor& q, const Tensor& k, const Scoring& how) {
  const int64_t sq = q.size(2), sk = k.size(2);
  const int64_t seed = how.seed ? how.seed->item<int64_t>() : 0;
  std::vector<Item> items;
  for (int64_t b = 0; b < q.size(0); ++b) {
    items.push_back({b, 0, 0, sq, sk, sk, seed, b * q.size(1) * sq});
  }
  if (how.key_lengths) {
    const Tensor lengths = how.key_lengths->to(at::kLong).contiguous();
    const auto* length = lengths.const_data_ptr<int64_t>();
    for (Item& item : items) item.length = std::clamp<int64_t>(length[item.batch], 0, sk);
  }
  return items;
}

// Where sequences begin, as int64. In a compiled graph the front has not seen the values.
Tensor edges_of(const char* name, const Tensor& cu, int64_t total) {
  const Tensor edges = cu.to(at::kLong).contiguous();
  const auto* first = edges.const_data_ptr<int64_t>();
  const auto* last = first + edges.size(0) - 1;
  const bool fits = *first == 0 && *last == total && std::is_sorted(first, last + 1);
  TORCH_CHECK_VALUE(fits, "attention_varlen: ", name, " is out of order or range; it must begin ",
                    "with 0, never fall and end with ", total, ".");
  return edges;
}

// Sequence b drops what attention of it alone would with the seed `seed ^ (b << 32)`.
std::vector<Item> packed_items(const Tensor& q_rows, const Tensor& k_rows, const Tensor& cu_q,
                               const Tensor& cu_k, const Optional& seed) {
  const Tensor edges_q = edges_of("cu_seqlens_q", cu_q, q_rows.size(0));
  const Tensor edges_k = edges_of("cu_seqlens_k", cu_k, k_rows.size(0));
  const auto* q = edges_q.const_data_ptr<int64_t>();
  const auto* k = edges_k.const_data_ptr<int64_t>();
  const int64_t drawn = seed ? seed->item<int64_t>() : 0;
  std::vector<Item> items;
  for (int64_t b = 0; b + 1 < edges_q.size(0); ++b) {
    const int64_t sk = k[b + 1] - k[b];
    items.push_back({0, q[b], k[b], q[b + 1] - q[b], sk, sk, drawn ^ (b << 32), 0});
  }
  return items;
}

// All but out and lse. `slopes` keeps what args points to.
Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::vector<Item>& items, const Scoring& how, Tensor& slopes) {
  Attention args{};
  args.dtype = float_of(q);
  args.items = items.data();
  args.num_items = static_cast<int64_t>(items.size());
  args.heads = k.size(1);
  args.group = q.size(1) / k.size(1);
  args.head_dim = q.size(3);
  args.value_dim = v.size(3);
  args.q = matrices(q);
  args.k = matrices(k);
  args.v = matrices(v);
  args.mask = term_of(how.mask);
  args.bias = term_of(how.bias);
  if (how.slopes) {
    slopes = how.slopes->to(at::kFloat).contiguous();
    args.slopes = slopes.const_data_ptr<float>();
  }
  args.left = how.left;
  args.right = how.causal ? 0 : how.right;
  args.softcap = static_cast<float>(how.softcap);
  args.scale = static_cast<float>(how.scale);
  args.dropout = how.dropout_p > 0;
  const Dropout dropout = dropout_of(0, how.dropout_p);  // each item has a seed of its own
  args.threshold = dropout.threshold;
  args.kept_scale = static_cast<float>(dropout.scale);
  return args;
}

void check(const Tensor& q) {
  TORCH_CHECK_VALUE(attention_runs(q.scalar_type()), "attention: torch multiplies no tiles of ",
                    q.scalar_type(), " on this CPU.");
}

// ---- forward and backward ---------------------------------------------------------------------

// out [B, Sq, Hq, Dv] as [B, Hq, Sq, Dv], and lse; of 4-D tensors.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::vector<Item>& items, const Scoring& how) {
  check(q);
  const Tensor out =
      at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2), 1}, q.options().dtype(at::kFloat));
  const Tensor rows_q = together(q), rows_k = together(k), rows_v = together(v);
  Tensor slopes;
  Attention args = attention_args(rows_q, rows_k, rows_v, items, how, slopes);
  args.out = matrices(out);
  args.lse = matrices(lse);
  if (lse.numel() > 0) TILEWISE_BEST(attention_forward)(args);
  return {out, lse.squeeze(3)};
}

int64_t parts_of(const AttentionBackward& args) {
  int64_t queries = 1;
  for (int64_t i = 0; i < args.num_items; ++i) {
    queries = std::max(queries, args.items[i].sq * (args.share_heads ? 1 : args.group));
  }
  const int64_t tasks = (args.share_items ? 1 : std::max<int64_t>(args.num_items, 1)) *
                        (args.share_heads ? 1 : args.heads);
  // Each part has sums of all keys: memory, and work that is lost on fewer than 256 queries.
  return std::clamp<int64_t>(32 / tasks, 1, std::min<int64_t>(8, (queries + 255) / 256));
}

// What parts of heads and items added up to, in order: sums [B, Hq, parts, keys] into dbias, whose
// stride is 0 in dims that are broadcast.
void reduce(const Tensor& sums, const Tensor& dbias) {
  const auto* from = sums.const_data_ptr<float>();
  auto* const to = dbias.data_ptr<float>();
  const int64_t keys = sums.size(3);
  for (int64_t b = 0; b < sums.size(0); ++b) {
    for (int64_t h = 0; h < sums.size(1); ++h) {
      float* const row = to + (dbias.size(0) == 1 ? 0 : b * dbias.stride(0)) +
                         (dbias.size(1) == 1 ? 0 : h * dbias.stride(1));
      for (int64_t p = 0; p < sums.size(2); ++p, from += keys) {
        for (int64_t j = 0; j < keys; ++j) row[j] += from[j];
      }
    }
  }
}

struct Gradients {
  Tensor q, k, v, bias;
};

Gradients backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& lse, const std::vector<Item>& items, const Scoring& how,
                   bool needs_bias, Gradients to) {
  check(q);
  const Tensor rows_q = together(q), rows_k = together(k), rows_v = together(v);
  const Tensor rows_grad = together(grad), rows_lse = lse.contiguous().unsqueeze(3);
  Tensor slopes, sums;
  std::unique_ptr<float[]> partial;  // no tensor: see RowBuffer on aligned memory
  AttentionBackward args{attention_args(rows_q, rows_k, rows_v, items, how, slopes)};
  args.lse = matrices(rows_lse);
  args.grad = matrices(rows_grad);
  args.dq = matrices(to.q);
  args.dk = matrices(to.k);
  args.dv = matrices(to.v);
  const bool by_query = needs_bias && how.bias->size(2) > 1;
  args.share_items = by_query && how.bias->size(0) == 1 && q.size(0) > 1;
  args.share_heads = by_query && how.bias->size(1) == 1 && q.size(1) > 1;
  args.parts = lse.numel() > 0 ? parts_of(args) : 1;
  for (const Item& item : items) args.longest = std::max(args.longest, item.length);
  if (needs_bias) {
    const auto f32 = q.options().dtype(at::kFloat);
    to.bias = at::zeros(how.bias->sizes(), f32);
    sums = by_query ? to.bias
                    : at::zeros({q.size(0), q.size(1), args.parts, to.bias.size(3)}, f32);
    args.dbias = sums.data_ptr<float>();
    const auto stride = [&](int64_t dim) { return sums.size(dim) == 1 ? 0 : sums.stride(dim); };
    args.dbias_batch = stride(0);
    args.dbias_head = stride(1);
    (by_query ? args.dbias_row : args.dbias_part) = stride(2);
    args.dbias_key = stride(3);
  }
  if (args.parts > 1) {
    const int64_t size = key_sums(args, args.longest);
    partial.reset(new float[args.num_items * args.heads * args.parts * size]);
    args.partial = partial.get();
  }
  if (lse.numel() > 0) {
    TILEWISE_BEST(attention_backward)(args);
  } else {
    for (const Tensor& none : {to.k, to.v}) none.zero_();
  }
  if (needs_bias && !by_query) reduce(sums, to.bias);
  if (needs_bias) to.bias = to.bias.to(how.bias->scalar_type());
  return to;
}

// ---- the ops ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask, const Optional& bias,
    const Optional& key_lengths, const Optional& alibi_slopes, const Optional& seed, bool causal,
    int64_t left, int64_t right, double softcap, double scale, double dropout_p) {
  const Scoring how{mask,  bias,  key_lengths, alibi_slopes, seed,     causal,
                    left,  right, softcap,     scale,        dropout_p};
  return forward(q, k, v, batch_items(q, k, how), how);
}

std::tuple<Tensor, Tensor, Tensor, Optional> attention_backward_cpu(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const Optional& mask, const Optional& bias, const Optional& key_lengths,
    const Optional& alibi_slopes, const Optional& seed, bool causal, int64_t left, int64_t right,
    double softcap, double scale, double dropout_p, bool needs_bias) {
  const Scoring how{mask,  bias,  key_lengths, alibi_slopes, seed,     causal,
                    left,  right, softcap,     scale,        dropout_p};
  const Gradients found =
      backward(grad, q, k, v, lse, batch_items(q, k, how), how, needs_bias,
               {empty_together(q), empty_together(k), empty_together(v), Tensor()});
  return {found.q, found.k, found.v, needs_bias ? Optional(found.bias) : std::nullopt};
}

std::tuple<Tensor, Tensor> attention_varlen_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
    const Optional& alibi_slopes, const Optional& seed, bool causal, int64_t left, int64_t right,
    double softcap, double scale, double dropout_p) {
  const Optional none;
  const Scoring how{none,  none,  none,    alibi_slopes, seed,     causal,
                    left,  right, softcap, scale,        dropout_p};
  const auto [out, lse] = forward(batch_of_one(q), batch_of_one(k), batch_of_one(v),
                                  packed_items(q, k, cu_q, cu_k, seed), how);
  return {out.squeeze(0).transpose(0, 1), lse.squeeze(0)};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward_cpu(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const Tensor& cu_q, const Tensor& cu_k, const Optional& alibi_slopes, const Optional& seed,
    bool causal, int64_t left, int64_t right, double softcap, double scale, double dropout_p) {
  const Optional none;
  const Scoring how{none,  none,  none,    alibi_slopes, seed,     causal,
                    left,  right, softcap, scale,        dropout_p};
  const Tensor dq = empty_together(q), dk = empty_together(k), dv = empty_together(v);
  backward(batch_of_one(grad), batch_of_one(q), batch_of_one(k), batch_of_one(v), lse.unsqueeze(0),
           packed_items(q, k, cu_q, cu_k, seed), how, false,
           {batch_of_one(dq), batch_of_one(dk), batch_of_one(dv), Tensor()});
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilewise_native, m) {
  m.def("attention_runs(ScalarType dtype) -> bool", attention_runs);
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, "
      "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? seed, bool causal, int left, int right, "
      "float softcap, float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? mask, "
      "Tensor? bias, Tensor? key_lengths, Tensor? alibi_slopes, Tensor? seed, bool causal, "
      "int left, int right, float softcap, float scale, float dropout_p, bool needs_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor?)");
  m.def(
      "attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, "
      "Tensor? alibi_slopes, Tensor? seed, bool causal, int left, int right, float softcap, "
      "float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, "
      "Tensor cu_q, Tensor cu_k, Tensor? alibi_slopes, Tensor? seed, bool causal, int left, "
      "int right, float softcap, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tilewise_native, CPU, m) {
  m.impl("attention_forward", attention_forward_cpu);
  m.impl("attention_backward", attention_backward_cpu);
  m.impl("attention_varlen_forward", attention_varlen_forward_cpu);
  m.impl("attention_varlen_backward", attention_varlen_backward_cpu);
}

}  // namespace tilewise
