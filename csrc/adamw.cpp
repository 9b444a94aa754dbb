// AdamW on the CPU. Compiled once per capability.
//
// One pass: param, m and v are read and written once and the gradient read once, 28 bytes an
// element in float32. Computes in float32, or float64 for float64. Half-precision moments are
// rounded once, when they are stored.

#include "adamw.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// One vector of a step; lanes past `count` are neither read nor written.
template <typename T, typename M, typename A>
void step(const AdamW& args, int64_t j, int64_t count) {
  using Vec = Vectorized<A>;
  T* const param = static_cast<T*>(args.param) + j;
  M* const m_at = static_cast<M*>(args.m) + j;
  M* const v_at = static_cast<M*>(args.v) + j;
  const bool whole = count == kLanes<A>;
  const auto get = [&](const auto* from) -> Vec { return whole ? read(from) : read(from, count); };
  const auto put = [&](auto* to, const Vec& value) {
    whole ? write(to, value) : write(to, value, count);
  };
  const Vec g = get(static_cast<const T*>(args.grad) + j) * Vec(A(args.grad_scale));
  const Vec m_old = get(m_at);
  const Vec m = at::vec::fmadd(g - m_old, Vec(A(1 - args.beta1)), m_old);
  const Vec v = at::vec::fmadd(g * g, Vec(A(1 - args.beta2)), get(v_at) * Vec(A(args.beta2)));
  Vec w;
  if constexpr (std::is_same_v<A, float>) {
    w = args.master != nullptr ? get(args.master + j) : get(param);
  } else {
    w = get(param);
  }
  const Vec denominator = v.sqrt() / Vec(A(args.root)) + Vec(A(args.eps));
  w = w * Vec(A(1 - args.decay)) - Vec(A(args.step_size)) * (m / denominator);
  put(m_at, m);
  put(v_at, v);
  if constexpr (std::is_same_v<A, float>) {
    if (args.master != nullptr) put(args.master + j, w);
  }
  put(param, w);
}

template <typename T, typename M>
void run(const AdamW& args) {
  using A = Accumulate<T>;
  at::parallel_for(0, args.size, kGrain, [&](int64_t begin, int64_t end) {
    int64_t j = begin;
    for (; j + kLanes<A> <= end; j += kLanes<A>) step<T, M, A>(args, j, kLanes<A>);
    if (j < end) step<T, M, A>(args, j, end - j);
  });
}

constexpr int64_t kBlock = 1 << 15;  // elements whose squares are summed in one go

// The same order of additions whatever the number of threads: partial sums of fixed blocks.
template <typename T>
double squares(const T* x, int64_t size) {
  using A = Accumulate<T>;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  std::vector<double> partial(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const T* const from = x + block * kBlock;
      const int64_t count = std::min(kBlock, size - block * kBlock);
      double sum = 0;
      for (int64_t strip = 0; strip < count; strip += 64 * kLanes<A>) {  // float32 for 64 terms
        const int64_t last = std::min(count, strip + 64 * kLanes<A>);
        Vectorized<A> sums(A(0));
        int64_t j = strip;
        for (; j + kLanes<A> <= last; j += kLanes<A>) {
          const auto value = read(from + j);
          sums = at::vec::fmadd(value, value, sums);
        }
        if (j < last) {
          const auto value = read(from + j, last - j);
          sums = at::vec::fmadd(value, value, sums);
        }
        sum += at::vec::vec_reduce_all<A>([](auto a, auto b) { return a + b; }, sums);
      }
      partial[block] = sum;
    }
  });
  double sum = 0;
  for (const double each : partial) sum += each;
  return sum;
}

}  // namespace

void adamw(const AdamW& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.moment_dtype == args.dtype) return run<T, T>(args);
    if constexpr (!std::is_same_v<T, double>) run<T, float>(args);
  });
}

double sum_of_squares(const void* x, Float dtype, int64_t size) {
  double sum = 0;
  with_type(dtype, [&](auto type) {
    sum = squares(static_cast<const decltype(type)*>(x), size);
  });
  return sum;
}

}  // namespace tilewise::CPU_CAPABILITY
