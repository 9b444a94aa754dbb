// What CPU kernels share: rows of any float type read and written as vectors of the type that sums
// are kept in. Included by the kernel files, which are compiled once per capability.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/bit_cast.h>

#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>

#include "floats.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
constexpr int64_t kLanes = Vectorized<A>::size();

// Work per task, in elements: below this a second thread costs more than it gives.
constexpr int64_t kGrain = 8192;

// One row in the accumulation type, with room to round its length up to whole vectors. Aligned by
// hand: glibc before 2.38 hardly reuses what its aligned allocation once gave (measured with calls
// of ever different sizes: 2 GB were left behind).
template <typename A>
class RowBuffer {
 public:
  explicit RowBuffer(int64_t columns)
      : memory_(::operator new((columns + kLanes<A>) * sizeof(A) + kAlignment)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    data_ = reinterpret_cast<A*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  ~RowBuffer() { ::operator delete(memory_); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;
  A* data() { return data_; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  void* memory_;
  A* data_;
};

// body(T()) for the C++ type T of `dtype`.
template <typename Body>
void with_type(Float dtype, const Body& body) {
  switch (dtype) {
    case Float::f32: return body(float());
    case Float::f64: return body(double());
    case Float::bf16: return body(c10::BFloat16());
    case Float::f16: return body(c10::Half());
  }
}

template <typename T, typename A = Accumulate<T>>
Vectorized<A> read(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    return Vectorized<A>::loadu(from);
  } else {
    Vectorized<float> value;
    at::vec::load_to_float<T>(from, value);
    return value;
  }
}

template <typename T, typename A = Accumulate<T>>
void write(T* to, const Vectorized<A>& value) {
  if constexpr (std::is_same_v<T, A>) {
    value.store(to);
  } else {  // convert_from_float would round twice as many
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    const auto half = [&] {
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return at::vec::cvtfp32_bf16(value);
      } else {
        return at::vec::cvtfp32_fp16(value);
      }
    }();
    std::memcpy(to, &half, sizeof(half));
#else
    at::vec::convert_from_float<T>(value, value).store(to, kLanes<A>);
#endif
  }
}

// The first `count` lanes; the others are zero.
template <typename T>
auto read(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return Vectorized<T>::loadu(from, count);
  } else {
    return std::get<0>(at::vec::convert_to_float<T>(Vectorized<T>::loadu(from, count)));
  }
}

template <typename T, typename A>
void write(T* to, const Vectorized<A>& value, int64_t count) {
  if constexpr (std::is_same_v<T, A>) {
    value.store(to, count);
  } else {
    at::vec::convert_from_float<T>(value, value).store(to, count);
  }
}

// A row with column stride 1: `row` itself, or a copy in `gathered`.
template <typename T>
const T* unit_stride(const T* row, int64_t stride, int64_t columns, T* gathered) {
  if (stride == 1) return row;
  for (int64_t j = 0; j < columns; ++j) gathered[j] = row[j * stride];
  return gathered;
}

// ---- arithmetic -------------------------------------------------------------------------------

// exp(x) for x <= 0, within 1 ulp down to 2^-126 and 0 below; NaN stays NaN.
inline Vectorized<float> exp_nonpositive(Vectorized<float> x) {
  using Vec = Vectorized<float>;
  // 1.5 * 2^23 + 127: adding it rounds to an integer n and leaves n + 127, the biased exponent,
  // in the low bits. At the clamp n = -127, whose scale 2^n comes out as exactly 0.
  const Vec shift(12582912.0f + 127.0f);
  x = at::vec::clamp_min(x, Vec(-88.02969f));
  Vec n = at::vec::fmadd(x, Vec(1.44269504f), shift);
  const auto exponent = at::vec::cast<int32_t>(n) << Vectorized<int32_t>(23);
  n = n - shift;
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec p(1.9875691500e-4f);
  p = at::vec::fmadd(p, r, Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r) + Vec(1.0f);
  return p * at::vec::cast<float>(exponent);
}

inline Vectorized<double> exp_nonpositive(const Vectorized<double>& x) { return x.exp(); }

// The larger of two, `top` where `value` is NaN.
template <typename A>
Vectorized<A> larger(const Vectorized<A>& top, const Vectorized<A>& value) {
  return at::vec::clamp_min(top, value);
}

template <typename A, typename Op>
A reduce(const Vectorized<A>& value, const Op& op) {
  return at::vec::vec_reduce_all(op, value);
}

template <typename A>
A sum_of(const Vectorized<A>& value) {
  return reduce(value, [](const Vectorized<A>& a, const Vectorized<A>& b) { return a + b; });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
