// Layer and RMS normalisation on the CPU. Compiled once per capability.
//
//   s = dropout(x) + residual          one read of each into a row buffer that stays in cache
//   mean, variance                     from the buffer: of s, then of the centred s
//   y = (s - mean) * rstd * weight + bias
//
// Memory: forward reads x and residual and writes s and y once; backward reads grad, s and grad_s
// and writes dx (and ds where it differs) once. Outputs too large for the caches are written past
// them, which saves reading the lines that are about to be overwritten.

#include "norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// ---- vectors of a row -------------------------------------------------------------------------

// body(j, Whole(), lane) for each whole vector at column j, then body(j, count, lane) for the
// columns left. Sums are kept in kSums vectors by lane, so that no addition waits for the one before.
struct Whole {};
constexpr int kSums = 4;

template <typename A, typename Body>
inline __attribute__((always_inline)) void each_vector(int64_t columns, const Body& body) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = 0;
  for (; j + kSums * lanes <= columns; j += kSums * lanes) {
    body(j, Whole(), 0);
    body(j + lanes, Whole(), 1);
    body(j + 2 * lanes, Whole(), 2);
    body(j + 3 * lanes, Whole(), 3);
  }
  for (; j + lanes <= columns; j += lanes) body(j, Whole(), 0);
  if (j < columns) body(j, columns - j, 0);
}

template <typename A>
struct Sums {
  Vectorized<A> lane[kSums] = {A(0), A(0), A(0), A(0)};

  A total() const {
    const auto add = [](const Vectorized<A>& a, const Vectorized<A>& b) { return a + b; };
    return at::vec::vec_reduce_all(add, (lane[0] + lane[1]) + (lane[2] + lane[3]));
  }
};

template <typename T>
auto read(const T* from, Whole) {
  return read(from);
}

// The value as it is stored in type T, and as it reads back. Half types fill half of a vector.
template <typename T, typename A>
Vectorized<T> narrowed(const Vectorized<A>& value) {
  if constexpr (std::is_same_v<T, A>) {
    return value;
  } else {
    return at::vec::convert_from_float<T>(value, value);
  }
}

template <typename A, typename T>
Vectorized<A> widened(const Vectorized<T>& value) {
  if constexpr (std::is_same_v<T, A>) {
    return value;
  } else {
    return std::get<0>(at::vec::convert_to_float<T>(value));
  }
}

// Writes past the caches; `to` lies on a multiple of the size of what is written.
template <typename T>
void stream(T* to, const Vectorized<T>& value) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_stream_ps(to, value);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_stream_pd(to, value);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(value));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    _mm256_stream_ps(to, value);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm256_stream_pd(to, value);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(value));
  }
#else
  value.store(to, kLanes<Accumulate<T>>);
#endif
}

// Streamed writes reach memory before another thread is told that they have.
inline void finish_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <bool streamed, typename T>
void put(T* to, const Vectorized<T>& value, Whole) {
  if constexpr (streamed) {
    stream(to, value);
  } else {
    value.store(to, kLanes<Accumulate<T>>);
  }
}

template <bool streamed, typename T>
void put(T* to, const Vectorized<T>& value, int64_t count) {
  value.store(to, count);
}

template <typename A>
Vectorized<A> only(const Vectorized<A>& value, Whole) {
  return value;
}

// The first `count` lanes; the others become 0.
template <typename A>
Vectorized<A> only(const Vectorized<A>& value, int64_t count) {
  return Vectorized<A>::set(Vectorized<A>(A(0)), value, count);
}

// Columns rounded up to whole vectors: what a RowBuffer has room for.
template <typename A>
int64_t padded(int64_t columns) {
  return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// ---- operands ---------------------------------------------------------------------------------

template <typename T>
const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

// A parameter in the wide type; `missing` throughout where there is none.
template <typename A>
void read_parameter(const void* from, Float type, int64_t columns, A missing, A* to) {
  if (from == nullptr) {
    std::fill(to, to + padded<A>(columns), missing);
    return;
  }
  with_type(type, [&](auto sample) {
    using P = decltype(sample);
    if constexpr (std::is_same_v<Accumulate<P>, A>) {
      const P* values = static_cast<const P*>(from);
      each_vector<A>(columns, [&](int64_t j, auto part, int) {
        read(values + j, part).store(to + j);
      });
    }
  });
}

// value * factor, 0 where the factor is 0 whatever the value.
template <typename A>
Vectorized<A> dropped(const Vectorized<A>& value, const A* factor) {
  const auto factors = Vectorized<A>::loadu(factor);
  const Vectorized<A> zero(A(0));
  return Vectorized<A>::blendv(value * factors, zero, factors == zero);
}

// ---- forward ----------------------------------------------------------------------------------

// Fills z with the row of s, rounded as it is stored, and writes it to `s` if that is not null.
// Returns the sum over the row, or the sum of squares.
template <bool streamed, typename T, typename R, typename A>
A sum_row(const NormForward& args, int64_t row, const A* factors, R* s, A* z) {
  using Vec = Vectorized<A>;
  const T* const x = row_of<T>(args.x, row);
  const R* const residual = args.residual.data ? row_of<R>(args.residual, row) : nullptr;
  const bool added = residual != nullptr, on = args.dropout.on(), squares = args.rms;
  Sums<A> sums;
  each_vector<A>(args.columns, [&](int64_t j, auto part, int lane) {
    Vec value = read(x + j, part);
    if (on) value = dropped(value, factors + j);
    if (added) value = value + read(residual + j, part);
    const auto stored = narrowed<R>(value);
    if (s != nullptr) put<streamed>(s + j, stored, part);
    if (on || added) value = widened<A>(stored);
    value.store(z + j);
    Vec& sum = sums.lane[lane];
    sum = squares ? at::vec::fmadd(value, value, sum) : sum + value;
  });
  return sums.total();
}

// Corrects the mean and returns the variance of a row of s. The mean of rounded sums is off by a
// little; what the centred values still sum to puts both right.
template <typename A>
A variance_of(const A* z, int64_t columns, A& mean) {
  using Vec = Vectorized<A>;
  Sums<A> sums, squares;
  each_vector<A>(columns, [&](int64_t j, auto part, int lane) {
    const Vec centred = only(Vec::loadu(z + j) - Vec(mean), part);
    sums.lane[lane] = sums.lane[lane] + centred;
    squares.lane[lane] = at::vec::fmadd(centred, centred, squares.lane[lane]);
  });
  const A off = sums.total() / columns;
  mean += off;
  const A variance = squares.total() / columns - off * off;
  return variance < 0 ? A(0) : variance;  // NaN stays
}

template <bool streamed, typename T, typename R>
void forward(const NormForward& args) {
  using A = Accumulate<T>;
  using Vec = Vectorized<A>;
  const int64_t columns = args.columns;
  at::parallel_for(0, args.rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    RowBuffer<A> z(columns), weight(columns), bias(columns);
    RowBuffer<A> factors(args.dropout.on() ? columns : 0);
    read_parameter(args.weight, args.parameter_type, columns, A(1), weight.data());
    read_parameter(args.bias, args.parameter_type, columns, A(0), bias.data());
    for (int64_t row = begin; row < end; ++row) {
      R* const s = args.s ? static_cast<R*>(args.s) + row * columns : nullptr;
      if (args.dropout.on()) {
        dropout_factors(args.dropout, row, 0, padded<A>(columns), factors.data());
      }
      const A sum = sum_row<streamed, T>(args, row, factors.data(), s, z.data());
      A mean = args.rms ? A(0) : sum / columns;
      const A spread = args.rms ? sum / columns : variance_of(z.data(), columns, mean);
      const A rstd = A(1) / std::sqrt(spread + static_cast<A>(args.eps));
      if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;
      if (args.rstd && !args.rms) static_cast<A*>(args.mean)[row] = mean;
      T* const y = static_cast<T*>(args.y) + row * columns;
      each_vector<A>(columns, [&](int64_t j, auto part, int) {
        const Vec normal = (Vec::loadu(z.data() + j) - Vec(mean)) * Vec(rstd);
        const Vec w = Vec::loadu(weight.data() + j), b = Vec::loadu(bias.data() + j);
        put<streamed>(y + j, narrowed<T>(at::vec::fmadd(normal, w, b)), part);
      });
    }
    if (streamed) finish_streams();
  });
}

// ---- backward ---------------------------------------------------------------------------------

template <typename A>
struct RowMeans {
  A of_g, of_g_normal;
};

// mean(g) and mean(g * n) of a row; adds the row to the sums of dweight and dbias.
template <typename T, typename R, typename A>
RowMeans<A> means_of_row(const NormBackward& args, const T* grad, const R* s, const A* weight,
                         A mean, A rstd, A* dweight, A* dbias) {
  using Vec = Vectorized<A>;
  const bool weighted = args.dweight != nullptr, biased = args.dbias != nullptr;
  Sums<A> sums, slopes;
  each_vector<A>(args.columns, [&](int64_t j, auto part, int lane) {
    const Vec upstream = read(grad + j, part);
    const Vec normal = (read(s + j, part) - Vec(mean)) * Vec(rstd);
    if (weighted) at::vec::fmadd(upstream, normal, Vec::loadu(dweight + j)).store(dweight + j);
    if (biased) (Vec::loadu(dbias + j) + upstream).store(dbias + j);
    const Vec g = upstream * Vec::loadu(weight + j);
    sums.lane[lane] = sums.lane[lane] + g;
    slopes.lane[lane] = at::vec::fmadd(g, normal, slopes.lane[lane]);
  });
  return {args.mean ? sums.total() / args.columns : A(0), slopes.total() / args.columns};
}

template <bool streamed, typename T, typename R, typename A>
void gradient_row(const NormBackward& args, int64_t row, const T* grad, const R* s,
                  const A* weight, A mean, A rstd, RowMeans<A> means, const A* factors) {
  using Vec = Vectorized<A>;
  const int64_t start = row * args.columns;
  const R* const grad_s = args.grad_s.data ? row_of<R>(args.grad_s, row) : nullptr;
  T* const dx = args.dx ? static_cast<T*>(args.dx) + start : nullptr;
  R* const ds = args.ds ? static_cast<R*>(args.ds) + start : nullptr;
  const bool added = grad_s != nullptr, on = args.dropout.on();
  each_vector<A>(args.columns, [&](int64_t j, auto part, int) {
    const Vec g = read(grad + j, part) * Vec::loadu(weight + j);
    const Vec normal = (read(s + j, part) - Vec(mean)) * Vec(rstd);
    Vec value = (g - Vec(means.of_g) - normal * Vec(means.of_g_normal)) * Vec(rstd);
    if (added) value = value + read(grad_s + j, part);
    if (ds != nullptr) put<streamed>(ds + j, narrowed<R>(value), part);
    if (on) value = dropped(value, factors + j);
    if (dx != nullptr) put<streamed>(dx + j, narrowed<T>(value), part);
  });
}

// dweight and dbias: the sums of the blocks, in order.
template <typename A>
void add_blocks(const NormBackward& args, int64_t blocks, int which, void* to) {
  if (to == nullptr) return;
  const A* const partial = static_cast<const A*>(args.partial) + which * args.partial_stride;
  with_type(args.parameter_type, [&](auto sample) {
    using P = decltype(sample);
    if constexpr (std::is_same_v<Accumulate<P>, A>) {
      each_vector<A>(args.columns, [&](int64_t j, auto part, int) {
        Vectorized<A> sum(A(0));
        for (int64_t b = 0; b < blocks; ++b) {
          sum = sum + Vectorized<A>::loadu(partial + 2 * b * args.partial_stride + j);
        }
        put<false>(static_cast<P*>(to) + j, narrowed<P>(sum), part);
      });
    }
  });
}

template <bool streamed, typename T, typename R>
void backward(const NormBackward& args) {
  using A = Accumulate<T>;
  const int64_t columns = args.columns, blocks = norm_blocks(args.rows);
  const int64_t block_rows = (args.rows + blocks - 1) / blocks;
  const int64_t grain = kGrain / (block_rows * columns) + 1;
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    RowBuffer<A> weight(columns), factors(args.dropout.on() ? columns : 0);
    read_parameter(args.weight, args.parameter_type, columns, A(1), weight.data());
    for (int64_t block = begin; block < end; ++block) {
      A* const dweight = static_cast<A*>(args.partial) + 2 * block * args.partial_stride;
      A* const dbias = dweight + args.partial_stride;
      std::fill(dweight, dweight + 2 * args.partial_stride, A(0));
      const int64_t last = std::min(args.rows, (block + 1) * block_rows);
      for (int64_t row = block * block_rows; row < last; ++row) {
        const T* const grad = row_of<T>(args.grad, row);
        const R* const s = row_of<R>(args.s, row);
        const A mean = args.mean ? static_cast<const A*>(args.mean)[row] : A(0);
        const A rstd = static_cast<const A*>(args.rstd)[row];
        const auto means =
            means_of_row(args, grad, s, weight.data(), mean, rstd, dweight, dbias);
        if (!args.dx && !args.ds) continue;
        if (args.dropout.on()) {
          dropout_factors(args.dropout, row, 0, padded<A>(columns), factors.data());
        }
        gradient_row<streamed>(args, row, grad, s, weight.data(), mean, rstd, means,
                               factors.data());
      }
    }
    if (streamed) finish_streams();
  });
  add_blocks<A>(args, blocks, 0, args.dweight);
  add_blocks<A>(args, blocks, 1, args.dbias);
}

// body(x's type, s's type, whether outputs are streamed) for the pairs that occur.
template <typename Args, typename Body>
void with_types(const Args& args, const Body& body) {
  const auto chosen = [&](auto x, auto s) {
    args.streamed ? body(x, s, std::true_type()) : body(x, s, std::false_type());
  };
  with_type(args.x_type, [&](auto x) {
    args.s_type == args.x_type ? chosen(x, x) : chosen(x, Accumulate<decltype(x)>());
  });
}

}  // namespace

void norm_forward(const NormForward& args) {
  with_types(args, [&](auto x, auto s, auto streamed) {
    forward<decltype(streamed)::value, decltype(x), decltype(s)>(args);
  });
}

void norm_backward(const NormBackward& args) {
  with_types(args, [&](auto x, auto s, auto streamed) {
    backward<decltype(streamed)::value, decltype(x), decltype(s)>(args);
  });
}

}  // namespace tilewise::CPU_CAPABILITY
