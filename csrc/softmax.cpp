// Softmax on the CPU. Compiled once per capability (CPU_CAPABILITY = DEFAULT, AVX2, AVX512).
//
//   z = scale * x, masked        one read of x, into a row buffer that stays in cache
//   e = exp(z - max z)           in the buffer
//   y = e / sum e                one write of y
//
// Memory: forward 2 * rows * columns elements, backward 3, plus each distinct mask row once.
// Accumulates in float32, or float64 for float64. NaN needs no branch: the maximum skips it, exp
// keeps it, so the sum and with it the whole row become NaN, as does a row that holds +inf.

#include "softmax.h"

#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// ---- forward ----------------------------------------------------------------------------------

template <typename A>
struct MaskLanes;
template <>
struct MaskLanes<float> {
  using type = int32_t;
};
template <>
struct MaskLanes<double> {
  using type = int64_t;
};

// A mask row in the accumulation type: what to add, or for a bool mask all bits set where the
// column is masked out, ready for a blend.
template <typename M, typename A>
void read_mask(const M* mask, int64_t stride, int64_t columns, A* out) {
  const auto convert = [](M value) -> A {
    if constexpr (std::is_same_v<M, bool>) {
      return c10::bit_cast<A>(typename MaskLanes<A>::type{value} - 1);
    } else {
      return static_cast<A>(value);
    }
  };
  if (stride == 1) {
    for (int64_t j = 0; j < columns; ++j) out[j] = convert(mask[j]);
  } else {
    for (int64_t j = 0; j < columns; ++j) out[j] = convert(mask[j * stride]);
  }
}

struct NoMask {};

// Returns what the columns past the causal diagonal hold: 0, or NaN in a row of NaN.
template <typename M, typename T, typename A>
T forward_row(const T* x, const A* mask, int64_t columns, A scale, A* z, T* y) {
  using Vec = Vectorized<A>;
  constexpr int64_t lanes = kLanes<A>;
  const Vec lowest(-std::numeric_limits<A>::infinity());
  const int64_t whole = columns - columns % lanes;
  const int64_t rest = columns - whole;

  const auto scores = [&](const Vec& value, int64_t j) {
    const Vec scaled = value * Vec(scale);
    if constexpr (std::is_same_v<M, NoMask>) {
      return scaled;
    } else if constexpr (std::is_same_v<M, bool>) {
      return Vec::blendv(scaled, lowest, Vec::loadu(mask + j));
    } else {
      return scaled + Vec::loadu(mask + j);
    }
  };
  Vec top = lowest;
  for (int64_t j = 0; j < whole; j += lanes) {
    const Vec score = scores(read(x + j), j);
    score.store(z + j);
    top = larger(top, score);
  }
  if (rest > 0) {
    const Vec score = Vec::set(lowest, scores(read(x + whole, rest), whole), rest);
    score.store(z + whole);
    top = larger(top, score);
  }

  A highest = reduce(top, larger<A>);
  if (highest == -std::numeric_limits<A>::infinity()) highest = 0;  // then every exp is 0 or NaN
  Vec sums(A(0));
  for (int64_t j = 0; j < columns; j += lanes) {
    const Vec e = exp_nonpositive(Vec::loadu(z + j) - Vec(highest));
    e.store(z + j);
    sums = sums + e;
  }
  const A sum = reduce(sums, [](const Vec& a, const Vec& b) { return a + b; });
  const A factor = sum == 0 ? A(0) : 1 / sum;
  const Vec inverse(factor);
  for (int64_t j = 0; j < whole; j += lanes) write(y + j, Vec::loadu(z + j) * inverse);
  if (rest > 0) write(y + whole, Vec::loadu(z + whole) * inverse, rest);
  return static_cast<T>(A(0) * factor);
}

template <typename T, typename M>
void forward(const SoftmaxForward& args) {
  using A = Accumulate<T>;
  const int64_t columns = args.columns;
  const T* const x = static_cast<const T*>(args.x);
  T* const y = static_cast<T*>(args.y);

  at::parallel_for(0, args.num_rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    RowBuffer<A> z(columns), mask_row(columns);
    RowBuffer<T> gathered(args.x_column_stride == 1 ? 0 : columns);
    int64_t mask_offset = -1;  // the row that mask_row holds: broadcast masks repeat theirs
    for (int64_t row = begin; row < end; ++row) {
      const RowOffset at = offset_of(args.rows, row);
      const int64_t active = attended(args, row);
      if constexpr (!std::is_same_v<M, NoMask>) {
        if (at.operand[1] != mask_offset) {
          mask_offset = at.operand[1];
          read_mask(static_cast<const M*>(args.mask) + mask_offset, args.mask_column_stride,
                    columns, mask_row.data());
        }
      }
      const T* x_row =
          unit_stride(x + at.operand[0], args.x_column_stride, active, gathered.data());
      T* const y_row = y + row * columns;
      const T past = forward_row<M>(x_row, mask_row.data(), active, A(args.scale), z.data(), y_row);
      std::fill(y_row + active, y_row + columns, past);
    }
  });
}

template <typename T>
void forward(const SoftmaxForward& args) {
  switch (args.mask_kind) {
    case Mask::none: return forward<T, NoMask>(args);
    case Mask::boolean: return forward<T, bool>(args);
    case Mask::f32: return forward<T, float>(args);
    case Mask::same_as_x: return forward<T, T>(args);
  }
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T, typename A>
void backward_row(const T* grad, const T* y, int64_t columns, A scale, T* dx) {
  using Vec = Vectorized<A>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = columns - columns % lanes;
  const int64_t rest = columns - whole;

  Vec sums(A(0));
  for (int64_t j = 0; j < whole; j += lanes) {
    sums = at::vec::fmadd(read(grad + j), read(y + j), sums);
  }
  if (rest > 0) {
    sums = at::vec::fmadd(read(grad + whole, rest), read(y + whole, rest), sums);
  }
  const Vec dot(reduce(sums, [](const Vec& a, const Vec& b) { return a + b; }));
  for (int64_t j = 0; j < whole; j += lanes) {
    write(dx + j, read(y + j) * Vec(scale) * (read(grad + j) - dot));
  }
  if (rest > 0) {
    const Vec value = read(y + whole, rest) * Vec(scale) * (read(grad + whole, rest) - dot);
    write(dx + whole, value, rest);
  }
}

template <typename T>
void backward(const SoftmaxBackward& args) {
  const int64_t columns = args.columns;
  at::parallel_for(0, args.num_rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    RowBuffer<T> gathered(args.grad_column_stride == 1 ? 0 : columns);
    for (int64_t row = begin; row < end; ++row) {
      const T* grad = static_cast<const T*>(args.grad) + offset_of(args.rows, row).operand[0];
      grad = unit_stride(grad, args.grad_column_stride, columns, gathered.data());
      backward_row(grad, static_cast<const T*>(args.y) + row * columns, columns,
                   Accumulate<T>(args.scale), static_cast<T*>(args.dx) + row * columns);
    }
  });
}

}  // namespace

void softmax_forward(const SoftmaxForward& args) {
  with_type(args.dtype, [&](auto type) { forward<decltype(type)>(args); });
}

void softmax_backward(const SoftmaxBackward& args) {
  with_type(args.dtype, [&](auto type) { backward<decltype(type)>(args); });
}

}  // namespace tilewise::CPU_CAPABILITY
