// The normaliser of a row of logits: what log-softmax, top-k and cross-entropy on the CPU share.
#pragma once

#include <c10/core/ScalarType.h>

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

// ---- dtypes -----------------------------------------------------------------------------------

// f(value of the C++ type of a float dtype)
template <typename F>
void with_type(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Double: return f(double{});
    case c10::ScalarType::BFloat16: return f(c10::BFloat16{});
    case c10::ScalarType::Half: return f(c10::Half{});
    default: return f(float{});
  }
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
