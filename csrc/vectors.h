// What CPU kernels share: rows of any float type read and written as vectors of the type that sums
// are kept in. Included by the kernel files, which are compiled once per capability.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <new>
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

// One row in the accumulation type, with room to round its length up to whole vectors.
template <typename A>
class RowBuffer {
 public:
  explicit RowBuffer(int64_t columns)
      : data_(static_cast<A*>(::operator new((columns + kLanes<A>) * sizeof(A), kAlignment))) {}
  ~RowBuffer() { ::operator delete(data_, kAlignment); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;
  A* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
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
    T lanes[kLanes<float>] = {};
    std::memcpy(lanes, from, count * sizeof(T));
    return read(lanes);
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

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
