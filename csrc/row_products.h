// Products of a few queries with rows of keys or values, which are read where they lie: attention
// where the queries are too few to pack its operands. Included by kernel files, which are compiled
// once per capability. Rows of floats have room for whole vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

using Vec = Vectorized<float>;
constexpr int64_t kWidth = kLanes<float>;
constexpr int64_t kAhead = 8;  // rows between a prefetch and the use

template <typename T>
void prefetch(const T* from, int64_t count) {
  for (int64_t d = 0; d < count; d += 64 / sizeof(T)) __builtin_prefetch(from + d);
}

// The sums of four vectors' lanes.
void sum_lanes(const Vec* sums, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44),
                                        _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    out[i] = at::vec::vec_reduce_all([](const Vec& a, const Vec& b) { return a + b; }, sums[i]);
  }
#endif
}

// scores[i] = q . keys[i] for four keys.
template <typename T>
void dot(const T* q, const T* const* keys, int64_t head_dim, float* scores) {
  const int64_t whole = head_dim - head_dim % kWidth;
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  for (int64_t d = 0; d < whole; d += kWidth) {
    const Vec query = read(q + d);
    for (int i = 0; i < 4; ++i) sums[i] = at::vec::fmadd(query, read(keys[i] + d), sums[i]);
  }
  if (const int64_t rest = head_dim - whole) {
    const Vec query = read(q + whole, rest);
    for (int i = 0; i < 4; ++i) {
      sums[i] = at::vec::fmadd(query, read(keys[i] + whole, rest), sums[i]);
    }
  }
  sum_lanes(sums, scores);
}

#ifdef CPU_CAPABILITY_AVX512
const bool kBFloat16Dot = __builtin_cpu_supports("avx512bf16");

// The same with products of two bfloat16 lanes at a time.
__attribute__((target("avx512bf16"))) inline void dot_bf16(const c10::BFloat16* q,
                                                     const c10::BFloat16* const* keys,
                                                     int64_t head_dim, float* scores) {
  __m512 sums[4] = {};
  for (int64_t d = 0; d < head_dim; d += 32) {
    const __mmask32 lanes = d + 32 <= head_dim ? ~0u : (1u << (head_dim - d)) - 1;
    const __m512bh query = (__m512bh)_mm512_maskz_loadu_epi16(lanes, q + d);
    for (int i = 0; i < 4; ++i) {
      const __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(lanes, keys[i] + d);
      sums[i] = _mm512_dpbf16_ps(sums[i], query, key);
    }
  }
  const Vec wide[4] = {sums[0], sums[1], sums[2], sums[3]};
  sum_lanes(wide, scores);
}
#endif

// scores[m][i] = queries[m] . keys[i]; up to three more pointers follow the last key. values are
// those that will be read next.
template <typename T>
void dots(const T* const* queries, int64_t shared, const T* const* keys, const T* const* values,
          int64_t count, int64_t head_dim, float* scores, int64_t stride) {
  for (int64_t i = 0; i < count; i += 4) {
    for (int64_t j = i; j < std::min(i + 4, count); ++j) {
      prefetch(keys[std::min(j + kAhead, count - 1)], head_dim);
      prefetch(values[j], head_dim);  // as fast as memory can: the weights come next
    }
    for (int64_t m = 0; m < shared; ++m) {
#ifdef CPU_CAPABILITY_AVX512
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        if (kBFloat16Dot) {
          dot_bf16(queries[m], keys + i, head_dim, scores + m * stride + i);
          continue;
        }
      }
#endif
      dot(queries[m], keys + i, head_dim, scores + m * stride + i);
    }
  }
}

// acc[j][d..] (+)= sum over i of p[j][i] values[i][d..], for Q queries and V vectors, the last of
// which has `last` lanes.
template <int Q, int V, typename T>
void weigh(const float* p, int64_t p_stride, const T* const* values, int64_t count, int64_t d,
           int64_t last, float* acc, int64_t stride, bool add) {
  Vec sum[Q][V];
  for (int j = 0; j < Q; ++j) {
    for (int v = 0; v < V; ++v) {
      sum[j][v] = add ? Vec::loadu(acc + j * stride + d + v * kWidth) : Vec(0.0f);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch(values[i + kAhead] + d, V * kWidth);
    Vec value[V];
    for (int v = 0; v < V; ++v) {
      const T* const from = values[i] + d + v * kWidth;
      value[v] = v + 1 == V && last < kWidth ? read(from, last) : read(from);
    }
    for (int j = 0; j < Q; ++j) {
      const Vec weight(p[j * p_stride + i]);
      for (int v = 0; v < V; ++v) sum[j][v] = at::vec::fmadd(weight, value[v], sum[j][v]);
    }
  }
  for (int j = 0; j < Q; ++j) {
    for (int v = 0; v < V; ++v) sum[j][v].store(acc + j * stride + d + v * kWidth);
  }
}

template <int Q, typename T>
void weigh(const float* p, int64_t p_stride, const T* const* values, int64_t count,
           int64_t head_dim, float* acc, int64_t stride, bool add) {
  int64_t d = 0;
  for (; d + 4 * kWidth <= head_dim; d += 4 * kWidth) {
    weigh<Q, 4>(p, p_stride, values, count, d, kWidth, acc, stride, add);
  }
  for (; d < head_dim; d += kWidth) {
    const int64_t last = std::min(kWidth, head_dim - d);
    weigh<Q, 1>(p, p_stride, values, count, d, last, acc, stride, add);
  }
}

// to[k][d..] = sum over m of weights[m][k] rows[m][d..], for K rows k and V vectors, the last of
// which has `last` lanes.
template <int K, int V, typename T>
void spread(const float* weights, int64_t stride, const float* rows, int64_t row_stride,
            int64_t shared, int64_t d, int64_t last, T* to, int64_t to_stride) {
  Vec sum[K][V];
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) sum[k][v] = Vec(0.0f);
  }
  for (int64_t m = 0; m < shared; ++m) {
    for (int k = 0; k < K; ++k) {
      const Vec weight(weights[m * stride + k]);
      for (int v = 0; v < V; ++v) {
        const Vec row = Vec::loadu(rows + m * row_stride + d + v * kWidth);
        sum[k][v] = at::vec::fmadd(weight, row, sum[k][v]);
      }
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) {
      T* const at = to + k * to_stride + d + v * kWidth;
      if (v + 1 == V && last < kWidth) {
        write(at, sum[k][v], last);
      } else {
        write(at, sum[k][v]);
      }
    }
  }
}

template <int K, typename T>
void spread(const float* weights, int64_t stride, const float* rows, int64_t row_stride,
            int64_t shared, int64_t width, T* to, int64_t to_stride) {
  int64_t d = 0;
  for (; d + 4 * kWidth <= width; d += 4 * kWidth) {
    spread<K, 4>(weights, stride, rows, row_stride, shared, d, kWidth, to, to_stride);
  }
  for (; d < width; d += kWidth) {
    const int64_t last = std::min(kWidth, width - d);
    spread<K, 1>(weights, stride, rows, row_stride, shared, d, last, to, to_stride);
  }
}

// body(std::integral_constant<int, Q>(), j): Q queries from number j on, up to `Most` at a time.
template <int Most, typename Body>
void in_groups(int64_t count, const Body& body, int64_t j = 0) {
  for (; j + Most <= count; j += Most) body(std::integral_constant<int, Most>(), j);
  if constexpr (Most > 1) in_groups<Most - 1>(count, body, j);
}

// to[k] = sum over m of weights[m][k] rows[m], for `count` rows k.
template <typename T>
void spread(const float* weights, int64_t stride, const float* rows, int64_t row_stride,
            int64_t shared, int64_t count, int64_t width, T* to, int64_t to_stride) {
  in_groups<4>(count, [&](auto some, int64_t k) {
    spread<some()>(weights + k, stride, rows, row_stride, shared, width, to + k * to_stride,
                   to_stride);
  });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
