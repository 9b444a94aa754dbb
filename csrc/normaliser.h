// The normaliser of a row of logits: what log-softmax, top-k and cross-entropy on the CPU share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// log-softmax of x is (x - top) - log_sum; spread is the sum of x - top over the columns.
template <typename A>
struct Normaliser {
  A top = 0;
  A log_sum = -std::numeric_limits<A>::infinity();
  double spread = 0;
};

// A piece of a row that stays in the first cache while it is read twice.
constexpr int64_t kPiece = 256;

// The largest value of x[0 .. count), -inf where there is none; skips NaN.
template <typename T, typename A = Accumulate<T>>
A largest(const T* x, int64_t count) {
  using Vec = Vectorized<A>;
  constexpr int64_t lanes = kLanes<A>;
  const Vec lowest(-std::numeric_limits<A>::infinity());
  Vec even = lowest, odd = lowest;
  int64_t j = 0;
  for (; j + 2 * lanes <= count; j += 2 * lanes) {
    even = larger(even, read(x + j));
    odd = larger(odd, read(x + j + lanes));
  }
  for (; j + lanes <= count; j += lanes) even = larger(even, read(x + j));
  if (j < count) odd = larger(odd, Vec::set(lowest, read(x + j, count - j), count - j));
  return reduce(larger(even, odd), larger<A>);
}

// One walk over a row; `visit(piece, top)` is told the largest value of each piece.
// NaN and +inf make log_sum NaN; a row of -inf alone has top 0 and log_sum -inf.
template <bool kSpread, typename T, typename Visit, typename A = Accumulate<T>>
Normaliser<A> normaliser(const T* x, int64_t columns, const Visit& visit) {
  using Vec = Vectorized<A>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Normaliser<A> result;
  A highest = lowest;
  Vec sums(A(0));
  for (int64_t begin = 0; begin < columns; begin += kPiece) {
    const int64_t end = std::min(columns, begin + kPiece);
    const A piece_top = largest(x + begin, end - begin);
    if (piece_top > highest) {
      sums = sums * Vec(highest == lowest ? A(0) : std::exp(highest - piece_top));
      if (kSpread) result.spread -= static_cast<double>(begin) * (double{piece_top} - result.top);
      result.top = highest = piece_top;
    }
    const Vec top(result.top);
    Vec exps(A(0)), spreads(A(0));  // of this piece: one long sum would gather rounding errors
    int64_t j = begin;
    for (; j + lanes <= end; j += lanes) {
      const Vec below = read(x + j) - top;
      if (kSpread) spreads = spreads + below;
      exps = exps + exp_nonpositive(below);
    }
    if (j < end) {
      const Vec below = read(x + j, end - j) - top;
      if (kSpread) spreads = spreads + Vec::set(Vec(A(0)), below, end - j);
      exps = exps + exp_nonpositive(Vec::set(Vec(lowest), below, end - j));
    }
    sums = sums + exps;
    if (kSpread) result.spread += sum_of(spreads);
    visit(begin / kPiece, piece_top);
  }
  result.log_sum = std::log(sum_of(sums));
  return result;
}

// ---- short rows: several at a time --------------------------------------------------------------

// A row of few columns spends its time on sums across a vector and on a logarithm. So kTogether
// rows of up to kShort columns are turned, and each has a lane of its own.
constexpr int64_t kTogether = 16, kShort = 128;

template <typename A>
int64_t rows_together(int64_t columns) {
  return std::is_same_v<A, float> && columns <= kShort ? kTogether : 1;
}

// out[j][r] = x[r * stride + j]; what belongs to no row is any number.
template <typename T>
void turn(const T* x, int64_t stride, int64_t rows, int64_t columns, float (*out)[kTogether]) {
  alignas(64) float copy[kTogether][kShort];
  const auto turn_from = [&](const float* from, int64_t distance) {
    for (int64_t j = 0; j < columns; j += kTogether) {
      const int64_t first = std::max<int64_t>(0, std::min(j, columns - kTogether));
      at::vec::transpose_mxn<float, kTogether, kTogether>(from + first, distance, out[first],
                                                          kTogether);
    }
  };
  if constexpr (std::is_same_v<T, float>) {
    if (rows == kTogether && columns >= kTogether) return turn_from(x, stride);
  }
  for (int64_t r = 0; r < kTogether; ++r) {
    const T* const row = x + std::min(r, rows - 1) * stride;
    int64_t j = 0;
    for (; j + kLanes<float> <= columns; j += kLanes<float>) read(row + j).store(copy[r] + j);
    if (j < columns) read(row + j, columns - j).store(copy[r] + j);
  }
  turn_from(copy[0], kShort);
}

// found[r] of each of up to kTogether rows.
template <bool kSpread, typename T>
void normalise_together(const T* x, int64_t stride, int64_t rows, int64_t columns,
                        Normaliser<float>* found) {
  using Vec = Vectorized<float>;
  alignas(64) float turned[kShort][kTogether], top[kTogether], log_sum[kTogether];
  alignas(64) float spread[kTogether] = {};
  turn(x, stride, rows, columns, turned);
  for (int64_t r = 0; r < kTogether; r += kLanes<float>) {
    const Vec lowest(-std::numeric_limits<float>::infinity());
    Vec highest = lowest, sum(0.0f), spreads(0.0f);
    for (int64_t j = 0; j < columns; ++j) highest = larger(highest, Vec::loadu(turned[j] + r));
    highest = Vec::blendv(highest, Vec(0.0f), highest == lowest);
    for (int64_t j = 0; j < columns; ++j) {
      const Vec below = Vec::loadu(turned[j] + r) - highest;
      if (kSpread) spreads = spreads + below;
      sum = sum + exp_nonpositive(below);
    }
    highest.store(top + r);
    sum.log().store(log_sum + r);
    if (kSpread) spreads.store(spread + r);
  }
  for (int64_t r = 0; r < rows; ++r) found[r] = {top[r], log_sum[r], spread[r]};
}

// found[r] of each of up to rows_together(columns) rows, `stride` elements apart.
template <bool kSpread, typename T, typename A = Accumulate<T>>
void normalisers(const T* x, int64_t stride, int64_t rows, int64_t columns, Normaliser<A>* found) {
  if constexpr (std::is_same_v<A, float>) {
    if (rows_together<A>(columns) > 1) {
      return normalise_together<kSpread>(x, stride, rows, columns, found);
    }
  }
  *found = normaliser<kSpread>(x, columns, [](int64_t, A) {});
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
