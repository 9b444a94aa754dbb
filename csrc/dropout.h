// Which elements dropout keeps: the C++ twin of kernels/tilewise_kernels/dropout.py.
#pragma once

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

}  // namespace tilewise
