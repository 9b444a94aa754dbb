// AdamW on the CPU. Compiled once per capability.
//
// One pass: param, m and v are read and written once and the gradient read once, 28 bytes an
// element in float32. Computes in float32, or float64 for float64. Half-precision moments are
// rounded once, when they are stored. Threads share the whole list, not each tensor: a model has
// many small ones.

#include "adamw.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// The step's constants, one vector each.
template <typename A>
struct Constants {
  using Vec = Vectorized<A>;
  explicit Constants(const AdamW& how)
      : grad_scale(A(how.grad_scale)), one_minus_beta1(A(1 - how.beta1)), beta2(A(how.beta2)),
        one_minus_beta2(A(1 - how.beta2)), one_over_root(A(1 / how.root)), eps(A(how.eps)),
        keep(A(1 - how.decay)), step_size(A(how.step_size)) {}
  const Vec grad_scale, one_minus_beta1, beta2, one_minus_beta2, one_over_root, eps, keep,
      step_size;
};

// One vector of a step; lanes past `count` are neither read nor written.
template <typename T, typename M, typename A>
inline void step(const AdamWPlace& at, const Constants<A>& with, int64_t j, int64_t count) {
  using Vec = Vectorized<A>;
  T* const param = static_cast<T*>(at.param) + j;
  M* const m_at = static_cast<M*>(at.m) + j;
  M* const v_at = static_cast<M*>(at.v) + j;
  const bool whole = count == kLanes<A>;
  const auto get = [&](const auto* from) -> Vec { return whole ? read(from) : read(from, count); };
  const auto put = [&](auto* to, const Vec& value) {
    whole ? write(to, value) : write(to, value, count);
  };
  const Vec g = get(static_cast<const T*>(at.grad) + j) * with.grad_scale;
  const Vec m_old = get(m_at);
  const Vec m = at::vec::fmadd(g - m_old, with.one_minus_beta1, m_old);
  const Vec v = at::vec::fmadd(g * g, with.one_minus_beta2, get(v_at) * with.beta2);
  Vec w;
  if constexpr (std::is_same_v<A, float>) {
    w = at.master != nullptr ? get(at.master + j) : get(param);
  } else {
    w = get(param);
  }
  const Vec denominator = at::vec::fmadd(v.sqrt(), with.one_over_root, with.eps);
  w = w * with.keep - with.step_size * (m / denominator);
  put(m_at, m);
  put(v_at, v);
  if constexpr (std::is_same_v<A, float>) {
    if (at.master != nullptr) put(at.master + j, w);
  }
  put(param, w);
}

template <typename T, typename M>
void run(const AdamWPlace given, const AdamW& how, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Constants<A> with(how);
  int64_t j = begin;
  for (; j + kLanes<A> <= end; j += kLanes<A>) step<T, M, A>(given, with, j, kLanes<A>);
  if (j < end) step<T, M, A>(given, with, j, end - j);
}

constexpr int64_t kBlock = 1 << 15;  // elements whose squares are summed in one go

template <typename T>
double squares(const T* from, int64_t count) {
  using A = Accumulate<T>;
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
  return sum;
}

}  // namespace

void adamw(const AdamWPlace* places, int64_t count, const AdamW& how) {
  const auto ends_after = [](int64_t element, const AdamWPlace& place) {
    return element < place.start + place.size;
  };
  const int64_t total = count == 0 ? 0 : places[count - 1].start + places[count - 1].size;
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    const AdamWPlace* place = std::upper_bound(places, places + count, begin, ends_after);
    for (; begin < end; begin = place->start + place->size, ++place) {
      const int64_t from = begin - place->start;
      const int64_t to = std::min(end - place->start, place->size);
      with_type(place->dtype, [&](auto type) {
        using T = decltype(type);
        if (place->moment_dtype == place->dtype) return run<T, T>(*place, how, from, to);
        if constexpr (!std::is_same_v<T, double>) run<T, float>(*place, how, from, to);
      });
    }
  });
}

// The same order of additions whatever the number of threads: partial sums of fixed blocks.
double sum_of_squares(const AdamWPlace* places, int64_t count) {
  struct Block {
    const AdamWPlace* place;
    int64_t from;
    double sum;
  };
  std::vector<Block> blocks;
  for (const AdamWPlace* place = places; place != places + count; ++place) {
    for (int64_t from = 0; from < place->size; from += kBlock) blocks.push_back({place, from, 0});
  }
  const int64_t number = blocks.size();
  const int64_t total = count == 0 ? 0 : places[count - 1].start + places[count - 1].size;
  at::parallel_for(0, number, 1 + number * kGrain / (total + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Block& block = blocks[i];
      with_type(block.place->dtype, [&](auto type) {
        const auto* const grad = static_cast<const decltype(type)*>(block.place->grad);
        const int64_t size = std::min(kBlock, block.place->size - block.from);
        block.sum = squares(grad + block.from, size);
      });
    }
  });
  double sum = 0;
  for (const Block& block : blocks) sum += block.sum;
  return sum;
}

}  // namespace tilewise::CPU_CAPABILITY
