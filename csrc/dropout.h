// Which elements dropout keeps: the C++ twin of kernels/tilewise_kernels/dropout.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace tilewise {

// The 32-bit finaliser of MurmurHash3 (Appleby 2011).
static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// The part of the number that a row's elements share.
static inline uint32_t mixed_row(int64_t seed, int64_t row) {
  const uint64_t s = static_cast<uint64_t>(seed), r = static_cast<uint64_t>(row);
  return mix(mix(static_cast<uint32_t>(r) ^ static_cast<uint32_t>(s)) ^
             static_cast<uint32_t>(r >> 32) ^ static_cast<uint32_t>(s >> 32));
}

static inline bool kept_at(uint32_t mixed, uint32_t column, uint32_t threshold) {
  return (mix(mixed ^ column) >> 8) >= threshold;
}

// Elements whose number is below the threshold become 0, the others are multiplied by `scale`.
struct Dropout {
  int64_t seed = 0;
  uint32_t threshold = 0;  // 0: no dropout
  double scale = 1;
  bool on() const { return threshold > 0; }
};

// The dropout of elements with probability p.
static inline Dropout dropout_of(int64_t seed, double p) {
  return {seed, static_cast<uint32_t>(std::ceil(p * (1 << 24))), p == 1 ? 0 : 1 / (1 - p)};
}

// What it multiplies the columns `first` and on of a row by.
template <typename A>
static void dropout_factors(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                            A* to) {
  const uint32_t mixed = mixed_row(dropout.seed, row), threshold = dropout.threshold;
  const A scale = static_cast<A>(dropout.scale);
  for (int64_t j = 0; j < count; ++j) {
    to[j] = kept_at(mixed, static_cast<uint32_t>(first + j), threshold) ? scale : A(0);
  }
}

}  // namespace tilewise
