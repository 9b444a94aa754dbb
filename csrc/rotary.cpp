// Rotary position embedding on the CPU. Compiled once per capability.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)    for each pair of columns, in one read and one write
//
// Pairs are columns (j, j + half), or (2j, 2j + 1) where interleaved. Computes in float32, or
// float64 for float64. Rows are walked in the order in which x lies in memory.

#include "rotary.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

template <typename Vec>
struct Pair {
  Vec a, b;
};

template <typename Vec>
Pair<Vec> turn(const Vec& a, const Vec& b, const Vec& cos, const Vec& sin) {
  return {at::vec::fmsub(a, cos, b * sin), at::vec::fmadd(b, cos, a * sin)};
}

template <typename Vec>
Pair<Vec> turn_back(const Vec& a, const Vec& b, const Vec& cos, const Vec& sin) {
  return {at::vec::fmadd(a, cos, b * sin), at::vec::fmsub(b, cos, a * sin)};
}

template <bool inverse, typename T, typename A>
void halves_row(const T* x, const A* cos, const A* sin, int64_t half, T* y) {
  constexpr int64_t lanes = kLanes<A>;
  const auto turned = inverse ? turn_back<Vectorized<A>> : turn<Vectorized<A>>;
  int64_t j = 0;
  for (; j + lanes <= half; j += lanes) {
    const auto p = turned(read(x + j), read(x + half + j), read(cos + j), read(sin + j));
    write(y + j, p.a);
    write(y + half + j, p.b);
  }
  if (const int64_t rest = half - j; rest > 0) {
    const auto p = turned(read(x + j, rest), read(x + half + j, rest), read(cos + j, rest),
                          read(sin + j, rest));
    write(y + j, p.a, rest);
    write(y + half + j, p.b, rest);
  }
}

template <bool inverse, typename T, typename A>
void pairs(const T* x, const Vectorized<A>& cos, const Vectorized<A>& sin, T* y) {
  constexpr int64_t lanes = kLanes<A>;
  const auto turned = inverse ? turn_back<Vectorized<A>> : turn<Vectorized<A>>;
  const auto [a, b] = at::vec::deinterleave2(read(x), read(x + lanes));
  const auto p = turned(a, b, cos, sin);
  const auto [low, high] = at::vec::interleave2(p.a, p.b);
  write(y, low);
  write(y + lanes, high);
}

template <bool inverse, typename T, typename A>
void pairs_row(const T* x, const A* cos, const A* sin, int64_t half, T* y) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = 0;
  for (; j + lanes <= half; j += lanes) {
    pairs<inverse>(x + 2 * j, read(cos + j), read(sin + j), y + 2 * j);
  }
  if (const int64_t rest = half - j; rest > 0) {
    T both[2 * lanes] = {};
    std::copy_n(x + 2 * j, 2 * rest, both);
    pairs<inverse>(both, read(cos + j, rest), read(sin + j, rest), both);
    std::copy_n(both, 2 * rest, y + 2 * j);
  }
}

template <typename T, bool interleaved, bool inverse>
void rotate(const Rotary& args) {
  using A = Accumulate<T>;
  const auto* const x = static_cast<const T*>(args.x);
  const auto* const cos = static_cast<const A*>(args.cos);
  const auto* const sin = static_cast<const A*>(args.sin);
  auto* const y = static_cast<T*>(args.y);
  const bool heads_inside = args.x_head < args.x_token;
  const int64_t inner = heads_inside ? args.heads : args.tokens;
  const int64_t outer = heads_inside ? args.tokens : args.heads;
  const int64_t turning = 2 * args.half;

  const auto row = [&](int64_t batch, int64_t head, int64_t token) {
    const T* const from = x + batch * args.x_batch + head * args.x_head + token * args.x_token;
    T* const to = y + batch * args.y_batch + head * args.y_head + token * args.y_token;
    const int64_t angle = batch * args.table_batch + token * args.table_token;
    if constexpr (interleaved) {
      pairs_row<inverse>(from, cos + angle, sin + angle, args.half, to);
    } else {
      halves_row<inverse>(from, cos + angle, sin + angle, args.half, to);
    }
    std::copy(from + turning, from + args.columns, to + turning);
  };
  const int64_t lines = args.batch * outer;
  const int64_t grain = kGrain / std::max<int64_t>(inner * args.columns, 1) + 1;
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t batch = line / outer, i = line % outer;
      for (int64_t j = 0; j < inner; ++j) row(batch, heads_inside ? j : i, heads_inside ? i : j);
    }
  });
}

template <typename T>
void rotate(const Rotary& args) {
  if (args.interleaved) {
    args.inverse ? rotate<T, true, true>(args) : rotate<T, true, false>(args);
  } else {
    args.inverse ? rotate<T, false, true>(args) : rotate<T, false, false>(args);
  }
}

}  // namespace

void rotary(const Rotary& args) {
  with_type(args.dtype, [&](auto type) { rotate<decltype(type)>(args); });
}

}  // namespace tilewise::CPU_CAPABILITY
