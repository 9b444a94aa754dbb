// x w^T + bias for few rows on the CPU. Compiled once per capability.
//
// A weight that is used once for a few rows is bound by memory, and packing it first, as a library
// does, costs more than the products. Here every row of w is read once, in its place: tiles of R
// rows of x times four rows of w, whose products add up along K in 4 R vectors. Each sum is made in
// the same order whatever the number of threads.
//
// Memory: w is read once, x once per sixteen columns from cache, y is written once. The CPU does not
// foresee four short rows at a time, so a tile asks for the rows of the next one.

#include "few_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "row_products.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

constexpr int64_t kColumns = 16;  // of a task: their rows of w stay in cache for all rows of x
constexpr int64_t kGroup = 64;    // rows of x whose sums wait to be written
constexpr int kMostRows = kWidth == 16 ? 4 : 2;  // of a tile: its sums stay in registers
constexpr int64_t kWork = 1 << 17;  // products per thread below which another costs more

// sums[r][i] = x[r] . w[i] for R rows and four columns. `ahead`: how far on the next columns lie.
template <int R, typename T>
void tile(const T* x, int64_t x_stride, const T* const* w, int64_t ahead, int64_t k, float* sums) {
  Vec sum[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[r][i] = Vec(0.0f);
  }
  const int64_t whole = k - k % kWidth;
  const auto add = [&](int64_t j, auto... rest) {
    Vec row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = read(x + r * x_stride + j, rest...);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec column = read(w[i] + j, rest...);
      __builtin_prefetch(w[i] + j + ahead, 0, 2);  // into L2: there it is 1.7 times as fast
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = at::vec::fmadd(row[r], column, sum[r][i]);
    }
  };
  for (int64_t j = 0; j < whole; j += kWidth) add(j);
  if (whole < k) add(whole, k - whole);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum_lanes(sum[r], sums + r * kColumns);
}

#ifdef CPU_CAPABILITY_AVX512
// The same with products of two bfloat16 lanes at a time.
template <int R>
__attribute__((target("avx512bf16"))) void tile_bf16(const c10::BFloat16* x, int64_t x_stride,
                                                      const c10::BFloat16* const* w,
                                                      int64_t ahead, int64_t k, float* sums) {
  __m512 sum[R][4] = {};
  for (int64_t j = 0; j < k; j += 32) {
    const __mmask32 lanes = j + 32 <= k ? ~0u : (1u << (k - j)) - 1;
    __m512bh row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      row[r] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + r * x_stride + j);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512bh column = (__m512bh)_mm512_maskz_loadu_epi16(lanes, w[i] + j);
      __builtin_prefetch(w[i] + j + ahead, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], row[r], column);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec wide[4] = {sum[r][0], sum[r][1], sum[r][2], sum[r][3]};
    sum_lanes(wide, sums + r * kColumns);
  }
}
#endif

template <int R, typename T>
void tile_of(const T* x, int64_t x_stride, const T* const* w, int64_t ahead, int64_t k,
             float* sums) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (kBFloat16Dot) return tile_bf16<R>(x, x_stride, w, ahead, k, sums);
  }
#endif
  tile<R>(x, x_stride, w, ahead, k, sums);
}

// Rows [row, row + rows) of y, columns from `column` on.
template <typename T>
void task(const FewRows& args, int64_t row, int64_t rows, int64_t column) {
  const T* const x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t columns = std::min(kColumns, args.n - column);
  float sums[kGroup * kColumns];
  for (int64_t c = 0; c < columns; c += 4) {
    const T* w[4];
    for (int64_t i = 0; i < 4; ++i) {  // the last row again where there are no more
      w[i] = weight + std::min(column + c + i, args.n - 1) * args.weight_stride;
    }
    const int64_t ahead = column + c + 8 <= args.n ? 4 * args.weight_stride : 0;
    in_groups<kMostRows>(rows, [&](auto some, int64_t r) {
      tile_of<some()>(x + r * args.x_stride, args.x_stride, w, r == 0 ? ahead : 0, args.k,
                      sums + r * kColumns + c);
    });
  }
  const T* const bias = static_cast<const T*>(args.bias);
  T* const y = static_cast<T*>(args.y) + row * args.n + column;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = std::min(kWidth, columns - c);
    const Vec shift = bias == nullptr ? Vec(0.0f) : read(bias + column + c, count);
    for (int64_t r = 0; r < rows; ++r) {
      write(y + r * args.n + c, Vec::loadu(sums + r * kColumns + c) + shift, count);
    }
  }
}

template <typename T>
void run(const FewRows& args) {
  const int64_t tasks = (args.n + kColumns - 1) / kColumns;
  const int64_t grain = 1 + kWork / (args.m * args.k * kColumns + 1);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t row = 0; row < args.m; row += kGroup) {
        task<T>(args, row, std::min(kGroup, args.m - row), i * kColumns);
      }
    }
  });
}

}  // namespace

int64_t few_rows_most(c10::ScalarType dtype) {
#if defined(CPU_CAPABILITY_AVX512)
  if (dtype == at::kFloat) return 32;
  if (dtype != at::kBFloat16) return 0;
  // oneDNN multiplies more rows on AMX, faster than these dot products can.
  return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16") ? 32 : 8;
#elif defined(CPU_CAPABILITY_AVX2)
  return dtype == at::kFloat ? 8 : 0;
#else
  return 0;
#endif
}

void few_rows(const FewRows& args) {
  if (args.dtype == Float::bf16) return run<c10::BFloat16>(args);
  run<float>(args);
}

}  // namespace tilewise::CPU_CAPABILITY
