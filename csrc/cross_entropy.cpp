// Cross-entropy on the CPU. Compiled once per capability.
//
//   top, log_sum, spread    one read of the logits, piece by piece (normaliser.h)
//   loss                    from these three and the target's logit
//   dlogits                 a second read, from cache where the same call found the statistics
//
// Memory: losses alone read rows * columns elements; the gradient reads and writes as many.

#include "cross_entropy.h"

#include <ATen/Parallel.h>

#include "normaliser.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

template <typename T, typename A>
A loss_of(const CrossEntropy& args, const T* x, int64_t target, const Normaliser<A>& found) {
  const A e = args.smoothing, lse = found.top + found.log_sum;
  A loss = found.log_sum - (1 - e) * (static_cast<A>(x[target]) - found.top);
  if (e != 0) loss -= e * static_cast<A>(found.spread / static_cast<double>(args.columns));
  return args.z == 0 ? loss : loss + A(args.z) * lse * lse;
}

template <typename T, typename A>
void gradient(const CrossEntropy& args, const T* x, int64_t target, const Normaliser<A>& found,
              A weight, T* dx) {
  using Vec = Vectorized<A>;
  const int64_t columns = args.columns;
  const A e = args.smoothing, lse = found.top + found.log_sum;
  const A scale = weight * (1 + 2 * A(args.z) * lse), even = weight * e / A(columns);
  const Vec top(found.top), log_sum(found.log_sum), scales(scale), evens(even);
  const auto slope = [&](const Vec& value) {
    return exp_nonpositive(value - top - log_sum) * scales - evens;
  };
  // Before the walk, which may overwrite x.
  const A p = std::exp(static_cast<A>(x[target]) - found.top - found.log_sum);
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) write(dx + j, slope(read(x + j)));
  if (j < columns) write(dx + j, slope(read(x + j, columns - j)), columns - j);
  dx[target] = static_cast<T>(p * scale - weight * ((1 - e) + e / A(columns)));
}

template <typename A>
const A* at(const void* values, int64_t index) {
  return static_cast<const A*>(values) + index;
}

template <typename T, typename A>
void row(const CrossEntropy& args, int64_t index, Normaliser<A> found) {
  const T* const x = at<T>(args.logits, index * args.stride);
  const int64_t target = args.target[index];
  A* const statistics = static_cast<A*>(args.statistics);
  T* const dx = static_cast<T*>(args.dlogits);
  if (target == args.ignored) {
    if (args.losses) static_cast<A*>(args.losses)[index] = 0;
    if (args.losses && statistics) statistics[2 * index] = statistics[2 * index + 1] = 0;
    if (dx) std::fill(dx + index * args.columns, dx + (index + 1) * args.columns, T(0));
    return;
  }
  if (args.losses) {
    static_cast<A*>(args.losses)[index] = loss_of(args, x, target, found);
    if (statistics) {
      statistics[2 * index] = found.top;
      statistics[2 * index + 1] = found.log_sum;
    }
  } else {
    found.top = statistics[2 * index];
    found.log_sum = statistics[2 * index + 1];
  }
  if (dx) {
    const A weight = *at<A>(args.weight, index * args.weight_stride) / A(args.divisor);
    gradient(args, x, target, found, weight, dx + index * args.columns);
  }
}

// One row, or several short ones.
template <typename T, typename A>
void rows(const CrossEntropy& args, int64_t first, int64_t count, Normaliser<A>* found) {
  if (args.losses && !(count == 1 && args.target[first] == args.ignored)) {
    const T* const x = at<T>(args.logits, first * args.stride);
    args.smoothing == 0 ? normalisers<false>(x, args.stride, count, args.columns, found)
                        : normalisers<true>(x, args.stride, count, args.columns, found);
  }
  for (int64_t r = 0; r < count; ++r) row<T>(args, first + r, found[r]);
}

}  // namespace

void cross_entropy(const CrossEntropy& args) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t step = rows_together<Accumulate<T>>(args.columns);
    at::parallel_for(0, args.rows, kGrain / args.columns + 1, [&](int64_t begin, int64_t end) {
      Normaliser<Accumulate<T>> found[kTogether];
      for (int64_t first = begin; first < end; first += step) {
        rows<T>(args, first, std::min(step, end - first), found);
      }
    });
  });
}

}  // namespace tilewise::CPU_CAPABILITY
