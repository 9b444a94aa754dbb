// log-softmax on the CPU, whole or its k largest values alone. Compiled once per capability.
//
//   top, log_sum     one read of x, piece by piece (normaliser.h)
//   threshold        k values at least are no less than the k-th largest of the pieces' tops
//   candidates       what reaches it, in the few pieces whose top does
//   y, scores        (x - top) - log_sum
//
// Memory: forward 2 * rows * columns elements (x is read a second time from cache), backward 3,
// top-k 1.

#include "log_softmax.h"

#include <ATen/Parallel.h>

#include <functional>
#include <numeric>
#include <vector>

#include "normaliser.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// ---- whole rows ---------------------------------------------------------------------------------

template <typename T, typename A>
void forward_row(const T* x, int64_t columns, const Normaliser<A>& found, T* y) {
  using Vec = Vectorized<A>;
  const Vec top(found.top), log_sum(found.log_sum);
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) write(y + j, read(x + j) - top - log_sum);
  if (j < columns) write(y + j, read(x + j, columns - j) - top - log_sum, columns - j);
}

template <typename T>
void forward(const LogSoftmaxForward& args) {
  using A = Accumulate<T>;
  const int64_t columns = args.columns, stride = args.x_stride, step = rows_together<A>(columns);
  at::parallel_for(0, args.rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    Normaliser<A> found[kTogether];
    for (int64_t row = begin; row < end; row += step) {
      const int64_t rows = std::min(step, end - row);
      const T* const x = static_cast<const T*>(args.x) + row * stride;
      T* const y = static_cast<T*>(args.y) + row * columns;
      normalisers<false>(x, stride, rows, columns, found);
      for (int64_t r = 0; r < rows; ++r) {
        forward_row(x + r * stride, columns, found[r], y + r * columns);
      }
    }
  });
}

template <typename T>
void backward_row(const T* grad, const T* y, int64_t columns, T* dx) {
  using A = Accumulate<T>;
  using Vec = Vectorized<A>;
  const int64_t whole = columns - columns % kLanes<A>, rest = columns - whole;
  Vec sums(A(0));
  for (int64_t j = 0; j < whole; j += kLanes<A>) sums = sums + read(grad + j);
  if (rest > 0) sums = sums + read(grad + whole, rest);
  const Vec total(sum_of(sums));
  const auto gradient = [&](const Vec& g, const Vec& log_p) {
    return g - exp_nonpositive(log_p) * total;
  };
  for (int64_t j = 0; j < whole; j += kLanes<A>) {
    write(dx + j, gradient(read(grad + j), read(y + j)));
  }
  if (rest > 0) {
    write(dx + whole, gradient(read(grad + whole, rest), read(y + whole, rest)), rest);
  }
}

// ---- the k largest ------------------------------------------------------------------------------

template <typename A>
struct Candidate {
  A value;
  int64_t id;
  bool operator<(const Candidate& other) const {  // the better one first
    return value > other.value || (value == other.value && id < other.id);
  }
};

// The k best of the values above a threshold, offered in the order of their ids: the list may hold
// twice as many before it is cut to the best k, whose last is the threshold from then on.
template <typename A>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { candidates_.reserve(2 * k + 16); }

  void start(A threshold) {
    candidates_.clear();
    threshold_ = threshold;
  }
  A threshold() const { return threshold_; }

  void offer(A value, int64_t id) {
    if (!(value > threshold_)) return;
    candidates_.push_back({value, id});
    if (candidates_.size() == candidates_.capacity()) {
      cut();
      threshold_ = candidates_.back().value;
    }
  }

  // At most k, best first.
  const std::vector<Candidate<A>>& sorted() {
    if (static_cast<int64_t>(candidates_.size()) > k_) cut();
    std::sort(candidates_.begin(), candidates_.end());
    return candidates_;
  }

 private:
  void cut() {  // to k, the worst of them last
    std::nth_element(candidates_.begin(), candidates_.begin() + k_ - 1, candidates_.end());
    candidates_.resize(k_);
  }

  int64_t k_;
  A threshold_ = 0;
  std::vector<Candidate<A>> candidates_;
};

// Offer every value of x[begin .. end) that is above the threshold.
template <typename T, typename A>
void collect(const T* x, int64_t begin, int64_t end, Best<A>& best) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = begin;
  for (; j + lanes <= end; j += lanes) {
    const auto above = read(x + j) > Vectorized<A>(best.threshold());
    for (unsigned mask = ~above.zero_mask() & ((1u << lanes) - 1); mask != 0; mask &= mask - 1) {
      const int64_t id = j + __builtin_ctz(mask);
      best.offer(static_cast<A>(x[id]), id);
    }
  }
  for (; j < end; ++j) best.offer(static_cast<A>(x[j]), j);
}

// -inf at the lowest ids, behind `found` better ones.
template <typename T, typename A>
void fill_with_lowest(const T* x, int64_t found, int64_t k, A* scores, int64_t* ids) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  for (int64_t j = 0; found < k; ++j) {
    if (static_cast<A>(x[j]) != lowest) continue;
    scores[found] = lowest;
    ids[found++] = j;
  }
}

// What the k best of a row are above, given the largest value of each piece of it.
template <typename A>
A threshold_of(std::vector<A> tops, int64_t k) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  if (k > static_cast<int64_t>(tops.size())) return lowest;
  std::nth_element(tops.begin(), tops.begin() + k - 1, tops.end(), std::greater<A>());
  return std::nextafter(tops[k - 1], lowest);
}

template <typename T, typename A>
void topk_row(const T* x, const LogSoftmaxTopk& args, std::vector<A>& tops, Best<A>& best,
              A* scores, int64_t* ids) {
  const auto found =
      normaliser<false>(x, args.columns, [&](int64_t piece, A top) { tops[piece] = top; });
  if (!std::isfinite(found.log_sum)) {  // NaN, +inf, or -inf alone: log-softmax is NaN throughout
    std::fill(scores, scores + args.k, std::numeric_limits<A>::quiet_NaN());
    std::iota(ids, ids + args.k, 0);
    return;
  }
  best.start(threshold_of(tops, args.k));
  for (size_t piece = 0; piece < tops.size(); ++piece) {
    const int64_t begin = piece * kPiece, end = std::min(args.columns, begin + kPiece);
    if (tops[piece] > best.threshold()) collect(x, begin, end, best);
  }
  int64_t i = 0;
  for (const auto& candidate : best.sorted()) {
    scores[i] = candidate.value - found.top - found.log_sum;
    ids[i++] = candidate.id;
  }
  fill_with_lowest(x, i, args.k, scores, ids);
}

template <typename T>
void topk(const LogSoftmaxTopk& args) {
  using A = Accumulate<T>;
  at::parallel_for(0, args.rows, kGrain / args.columns + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> tops((args.columns + kPiece - 1) / kPiece);
    Best<A> best(args.k);
    for (int64_t row = begin; row < end; ++row) {
      topk_row(static_cast<const T*>(args.x) + row * args.x_stride, args, tops, best,
               static_cast<A*>(args.scores) + row * args.k, args.ids + row * args.k);
    }
  });
}

}  // namespace

void log_softmax_forward(const LogSoftmaxForward& args) {
  with_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void log_softmax_backward(const LogSoftmaxBackward& args) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, args.rows, kGrain / args.columns + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row(static_cast<const T*>(args.grad) + row * args.grad_stride,
                     static_cast<const T*>(args.y) + row * args.columns, args.columns,
                     static_cast<T*>(args.dx) + row * args.columns);
      }
    });
  });
}

void log_softmax_topk(const LogSoftmaxTopk& args) {
  with_type(args.dtype, [&](auto zero) { topk<decltype(zero)>(args); });
}

}  // namespace tilewise::CPU_CAPABILITY
