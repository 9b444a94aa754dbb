// Decode attention on the CPU. Compiled once per capability (CPU_CAPABILITY = DEFAULT, AVX2,
// AVX512).
//
//   a task: up to kChunk positions of one row under one key head, for all queries that share it
//     s = scale * q k^T - slope * distance + bias      one read of the keys
//     p = exp(s - max s)
//     peak = max s, total = sum p, acc = p v           one read of the values
//   then each query adds up its tasks: out = sum(e^(peak - top) acc) / sum(e^(peak - top) total)
//
// A key is read through a pointer, so that rows, beams and pages are one case. Tasks are numbered
// with the heads of one chunk together: where the cache is stored by position they are neighbours
// in memory. A task knows nothing of the others and sums have one order: the result is the same bits
// for any number of threads. Accumulates in float32. NaN behaves as in softmax.cpp.

#include "decode_attention.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_products.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kWork = 1 << 15;  // multiply-adds per task, below which a thread costs more
constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth * kWidth; }

// ---- one task ---------------------------------------------------------------------------------

// Pointers to the keys and values of positions [begin, end) of a row.
template <typename T>
void locate(const DecodeAttention& args, int64_t row, int64_t head, int64_t begin, int64_t end,
            const T** keys, const T** values) {
  const T* const k = static_cast<const T*>(args.k) + head * args.k_stride.head;
  const T* const v = static_cast<const T*>(args.v) + head * args.v_stride.head;
  const int64_t* const table = args.table + row * args.table_width;
  for (int64_t t = begin; t < end; ++t) {
    int64_t at = t, from = row;
    if (args.lookup == Lookup::beam) {
      from = table[t];
    } else if (args.lookup == Lookup::page) {
      from = table[t / args.page_size];
      at = t % args.page_size;
    }
    *keys++ = k + from * args.k_stride.row + at * args.k_stride.position;
    *values++ = v + from * args.v_stride.row + at * args.v_stride.position;
  }
}

// Dot products of `count` positions from `begin` on become weights; returns their peak and sum.
struct Weights {
  float peak, total;
};

Weights soften(const DecodeAttention& args, int64_t row, int64_t head, int64_t query,
               int64_t begin, int64_t count, float* s) {
  const int64_t at = args.lengths[row] - args.queries + query;
  const int64_t first = args.left < 0 ? 0 : at - args.left;
  const float slope = args.alibi_slopes ? args.alibi_slopes[head] : 0.0f;
  for (int64_t i = 0; i < count; ++i) s[i] *= args.scale;
  if (slope != 0.0f) {
    for (int64_t i = 0; i < count; ++i) s[i] -= slope * static_cast<float>(at - begin - i);
  }
  if (args.bias) {
    const float* const bias = args.bias + row * args.bias_stride[0] +
                              head * args.bias_stride[1] + query * args.bias_stride[2];
    for (int64_t i = 0; i < count; ++i) s[i] += bias[(begin + i) * args.bias_stride[3]];
  }
  const int64_t size = (count + kWidth - 1) / kWidth * kWidth;
  const int64_t hidden = std::clamp(first - begin, int64_t{0}, count);
  const int64_t seen = std::clamp(at + 1 - begin, int64_t{0}, count);
  std::fill(s, s + hidden, kLowest);
  std::fill(s + seen, s + size, kLowest);

  Vec top(kLowest);
  for (int64_t i = 0; i < size; i += kWidth) top = at::vec::clamp_min(top, Vec::loadu(s + i));
  const float peak = at::vec::vec_reduce_all(
      [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }, top);
  const Vec origin(peak == kLowest ? 0.0f : peak);
  Vec sum(0.0f);
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vec p = (Vec::loadu(s + i) - origin).exp();
    p.store(s + i);
    sum = sum + p;
  }
  return {peak, at::vec::vec_reduce_all([](const Vec& a, const Vec& b) { return a + b; }, sum)};
}

// What a task leaves for one query: acc [padded(D)], then peak and total.
int64_t partial_size(const DecodeAttention& args) { return padded(args.head_dim) + kWidth; }

template <typename T>
void attend(const DecodeAttention& args, int64_t row, int64_t head, int64_t chunk, float* scores,
            float* partial) {
  const int64_t width = padded(args.head_dim), shared = args.group * args.queries;
  const int64_t stride = partial_size(args);
  const int64_t length = args.lengths[row];
  const int64_t first = args.left < 0 ? 0 : length - args.queries - args.left;
  const int64_t begin = std::max(chunk * kChunk, first);
  const int64_t count = std::min((chunk + 1) * kChunk, length) - begin;
  if (count <= 0) {
    for (int64_t m = 0; m < shared; ++m) partial[m * stride + width + 1] = 0.0f;
    return;
  }
  const T* keys[kChunk];
  const T* values[kChunk];
  locate(args, row, head, begin, begin + count, keys, values);
  for (int64_t i = count; i % 4 != 0; ++i) keys[i] = keys[count - 1];
  const T* queries[kMaxShared];
  for (int64_t m = 0; m < shared; ++m) {
    queries[m] = static_cast<const T*>(args.q) + row * args.q_stride.row +
                 (head * args.group + m / args.queries) * args.q_stride.head +
                 m % args.queries * args.q_stride.position;
  }
  dots(queries, shared, keys, values, count, args.head_dim, scores, kChunk);
  for (int64_t m = 0; m < shared; ++m) {
    const Weights weights = soften(args, row, head * args.group + m / args.queries,
                                   m % args.queries, begin, count, scores + m * kChunk);
    partial[m * stride + width] = weights.peak;
    partial[m * stride + width + 1] = weights.total;
  }
  in_groups<4>(shared, [&](auto some, int64_t m) {
    weigh<some()>(scores + m * kChunk, kChunk, values, count, args.head_dim, partial + m * stride,
                  stride, false);
  });
}

// ---- all tasks --------------------------------------------------------------------------------

// One query's output from its partials, `step` floats apart. A task with total 0 saw nothing.
template <typename T>
void combine(const float* partial, int64_t step, int64_t chunks, int64_t head_dim, float* acc,
             T* out) {
  const int64_t width = padded(head_dim);
  float top = kLowest, total = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) {
    const float* const tail = partial + c * step + width;
    if (tail[1] != 0.0f && tail[0] > top) top = tail[0];
  }
  std::fill(acc, acc + width, 0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const float* const part = partial + c * step;
    if (part[width + 1] == 0.0f) continue;
    const float weight = part[width] == top ? 1.0f : std::exp(part[width] - top);
    total += weight * part[width + 1];
    for (int64_t d = 0; d < head_dim; ++d) acc[d] += weight * part[d];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = static_cast<T>(acc[d] * inverse);
}

template <typename T>
void decode(const DecodeAttention& args) {
  const int64_t width = padded(args.head_dim), shared = args.group * args.queries;
  const int64_t chunks = (args.longest + kChunk - 1) / kChunk;
  const int64_t step = shared * partial_size(args);  // of one task
  const int64_t pairs = args.rows * args.kv_heads;
  RowBuffer<float> partials(pairs * chunks * step);

  const int64_t work = 2 * shared * args.head_dim * std::min(args.longest, kChunk);
  at::parallel_for(0, pairs * chunks, kWork / work + 1, [&](int64_t begin, int64_t end) {
    RowBuffer<float> scores(shared * kChunk);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % args.kv_heads, chunk = task / args.kv_heads % chunks;
      const int64_t row = task / args.kv_heads / chunks;
      attend<T>(args, row, head, chunk, scores.data(),
                partials.data() + ((row * args.kv_heads + head) * chunks + chunk) * step);
    }
  });
  const int64_t each = args.head_dim * (chunks + 1);
  at::parallel_for(0, pairs * shared, kWork / each + 1, [&](int64_t begin, int64_t end) {
    RowBuffer<float> acc(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* const first =
          partials.data() + i / shared * chunks * step + i % shared * partial_size(args);
      combine(first, step, chunks, args.head_dim, acc.data(),
              static_cast<T*>(args.out) + i * args.head_dim);
    }
  });
}

}  // namespace

void decode_attention(const DecodeAttention& args) {
  switch (args.dtype) {
    case Float::f32: return decode<float>(args);
    case Float::bf16: return decode<c10::BFloat16>(args);
    case Float::f16: return decode<c10::Half>(args);
    case Float::f64: return;  // refused by the op
  }
}

}  // namespace tilewise::CPU_CAPABILITY
