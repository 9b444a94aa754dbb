// Activation, gate and dropout of a feed-forward block on the CPU. Compiled once per capability.
//
//   forward    a = drop(act(h) * g)                              one read of h and g, one write
//   backward   r = drop(da)    dh = r * g * act'(h)    dg = r * act(h)    a as in forward
//
// in one pass, so that act(h) and act'(h) share their exponential and nothing of act is stored.
// Computes in float32, or float64 for float64.

#include "activation.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "vectors.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

constexpr double kLog2 = 0.69314718055994530942;
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInverseSqrtTwoPi = 0.39894228040143267794;
constexpr double kSqrtEightOverPi = 1.59576912160573071176;

// ---- activations ------------------------------------------------------------------------------

template <typename Vec>
struct Curve {
  Vec value, slope;  // act(h), act'(h)
};

// 2^y for y <= 0, within 3e-7 of itself down to 2^-126 and 0 below; NaN stays NaN.
// Why not exp_nonpositive: to reduce by ln 2 twice and the longer polynomial cost forwards 20-35%.
inline Vectorized<float> exp2_nonpositive(Vectorized<float> y) {
  using Vec = Vectorized<float>;
  // 1.5 * 2^23 + 127: adding it rounds to an integer n and leaves n + 127, the biased exponent,
  // in the low bits. At the clamp n = -127, whose scale 2^n comes out as exactly 0.
  const Vec shift(12582912.0f + 127.0f);
  y = at::vec::clamp_min(y, Vec(-127.0f));
  const Vec n = y + shift;
  const auto exponent = at::vec::cast<int32_t>(n) << Vectorized<int32_t>(23);
  const Vec r = y - (n - shift);
  Vec p(1.3276472e-3f);
  p = at::vec::fmadd(p, r, Vec(9.6755419e-3f));
  p = at::vec::fmadd(p, r, Vec(5.5507131e-2f));
  p = at::vec::fmadd(p, r, Vec(2.4022120e-1f));
  p = at::vec::fmadd(p, r, Vec(6.9314694e-1f));
  p = at::vec::fmadd(p, r, Vec(1.0f));
  return p * at::vec::cast<float>(exponent);
}

inline Vectorized<double> exp2_nonpositive(const Vectorized<double>& y) {
  return (y * Vectorized<double>(kLog2)).exp();
}

// h * cdf(h) with the normal distribution, whose tail is 0.5 * erfc(|h| / sqrt 2).
inline Curve<Vectorized<float>> gelu(const Vectorized<float>& h) {
  using Vec = Vectorized<float>;
  const Vec one(1.0f), half(0.5f);
  const Vec e = exp2_nonpositive(h * h * Vec(float(-0.5 / kLog2)));  // exp(-h^2 / 2)
  // Abramowitz and Stegun 7.1.26, halved: 0.5 erfc(x) = poly(t) exp(-x^2) within 1e-7
  const Vec t = one / at::vec::fmadd(h.abs(), Vec(float(0.3275911 * kSqrtHalf)), one);
  Vec poly(0.5f * 1.061405429f);
  poly = at::vec::fmadd(poly, t, Vec(0.5f * -1.453152027f));
  poly = at::vec::fmadd(poly, t, Vec(0.5f * 1.421413741f));
  poly = at::vec::fmadd(poly, t, Vec(0.5f * -0.284496736f));
  poly = at::vec::fmadd(poly, t, Vec(0.5f * 0.254829592f));
  const Vec sign = h & Vec(-0.0f);
  const Vec cdf = half + ((half - poly * t * e) ^ sign);
  return {h * cdf, at::vec::fmadd(h, e * Vec(float(kInverseSqrtTwoPi)), cdf)};
}

inline Curve<Vectorized<double>> gelu(const Vectorized<double>& h) {
  using Vec = Vectorized<double>;
  const Vec cdf = (Vec(1.0) + (h * Vec(kSqrtHalf)).erf()) * Vec(0.5);
  const Vec pdf = (h * h * Vec(-0.5)).exp() * Vec(kInverseSqrtTwoPi);
  return {h * cdf, at::vec::fmadd(h, pdf, cdf)};
}

template <typename Vec>
Vec sigmoid(const Vec& z) {
  const Vec e = exp2_nonpositive(z.abs() * Vec(-1 / kLog2)), one(1);
  return Vec::blendv(one, e, z < Vec(0)) / (one + e);
}

// h * sigmoid(z(h)); dz is z'.
template <typename Vec>
Curve<Vec> swish(const Vec& h, const Vec& z, const Vec& dz) {
  const Vec s = sigmoid(z), value = h * s;
  return {value, at::vec::fmadd(value * (Vec(1) - s), dz, s)};
}

template <Act act, typename Vec>
Curve<Vec> curve(const Vec& h) {
  if constexpr (act == Act::gelu) {
    return gelu(h);
  } else if constexpr (act == Act::gelu_tanh) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    const Vec square = h * h, c(kSqrtEightOverPi);
    return swish(h, h * c * at::vec::fmadd(square, Vec(0.044715), Vec(1)),
                 c * at::vec::fmadd(square, Vec(3 * 0.044715), Vec(1)));
  } else if constexpr (act == Act::relu) {
    return {at::vec::maximum(h, Vec(0)), Vec::blendv(Vec(1), Vec(0), h <= Vec(0))};
  } else if constexpr (act == Act::silu) {
    return swish(h, h, Vec(1));
  } else if constexpr (act == Act::quick_gelu) {
    return swish(h, h * Vec(1.702), Vec(1.702));
  } else {
    return {h, Vec(1)};
  }
}

template <typename Body>
void with_act(Act act, const Body& body) {
  switch (act) {
    case Act::gelu: return body(std::integral_constant<Act, Act::gelu>());
    case Act::gelu_tanh: return body(std::integral_constant<Act, Act::gelu_tanh>());
    case Act::relu: return body(std::integral_constant<Act, Act::relu>());
    case Act::silu: return body(std::integral_constant<Act, Act::silu>());
    case Act::quick_gelu: return body(std::integral_constant<Act, Act::quick_gelu>());
    case Act::identity: return body(std::integral_constant<Act, Act::identity>());
  }
}

// ---- the passes -------------------------------------------------------------------------------

constexpr int64_t kStrip = 256;  // columns whose dropout factors are found at a time

// body(offset, count, factors): strips of rows, in parallel; factors is null without dropout.
template <typename A, typename Body>
void for_strips(const Activation& args, const Body& body) {
  const bool drops = args.dropout.on();
  const int64_t strips = (args.columns + kStrip - 1) / kStrip;
  at::parallel_for(0, args.rows * strips, kGrain / kStrip, [&](int64_t begin, int64_t end) {
    A factors[kStrip];
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip / strips, first = strip % strips * kStrip;
      const int64_t count = std::min(kStrip, args.columns - first);
      if (drops) dropout_factors(args.dropout, row, first, count, factors);
      body(row * args.columns + first, count, drops ? factors : nullptr);
    }
  });
}

// body(j, read, write) for each vector of a strip: read(from) and write(to, value) take its lanes.
template <typename A, typename Body>
void for_vectors(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    body(j, [](const auto* from) { return read(from); },
         [](auto* to, const auto& value) { write(to, value); });
  }
  if (const int64_t rest = count - j; rest > 0) {
    body(j, [&](const auto* from) { return read(from, rest); },
         [&](auto* to, const auto& value) { write(to, value, rest); });
  }
}

template <typename T>
T* at(void* tensor, int64_t offset) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + offset;
}

template <typename T>
const T* at(const void* tensor, int64_t offset) {
  return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + offset;
}

template <typename T, Act act>
void forward(const Activation& args) {
  using A = Accumulate<T>;
  for_strips<A>(args, [&](int64_t offset, int64_t count, const A* factors) {
    const T* const h = at<T>(args.h, offset);
    const T* const g = at<T>(args.g, offset);
    T* const a = at<T>(args.a, offset);
    for_vectors<A>(count, [&](int64_t j, const auto& read, const auto& write) {
      auto value = curve<act>(read(h + j)).value;
      if (g != nullptr) value = value * read(g + j);
      if (factors != nullptr) value = value * read(factors + j);
      write(a + j, value);
    });
  });
}

template <typename T, Act act>
void backward(const ActivationBackward& args) {
  using A = Accumulate<T>;
  for_strips<A>(args.forward, [&](int64_t offset, int64_t count, const A* factors) {
    const T* const h = at<T>(args.forward.h, offset);
    const T* const g = at<T>(args.forward.g, offset);
    const T* const da = at<T>(args.da, offset);
    T* const a = at<T>(args.forward.a, offset);
    T* const dh = at<T>(args.dh, offset);
    T* const dg = at<T>(args.dg, offset);
    for_vectors<A>(count, [&](int64_t j, const auto& read, const auto& write) {
      const auto curved = curve<act>(read(h + j));
      auto grad = read(da + j), value = curved.value;
      if (factors != nullptr) {
        grad = grad * read(factors + j);
        if (a != nullptr) value = value * read(factors + j);
      }
      if (g != nullptr) {
        const auto gate = read(g + j);
        if (dg != nullptr) write(dg + j, grad * curved.value);
        grad = grad * gate;
        value = value * gate;
      }
      write(dh + j, grad * curved.slope);
      if (a != nullptr) write(a + j, value);
    });
  });
}

}  // namespace

void activation(const Activation& args) {
  with_type(args.dtype, [&](auto type) {
    with_act(args.act, [&](auto act) { forward<decltype(type), decltype(act)::value>(args); });
  });
}

void activation_backward(const ActivationBackward& args) {
  with_type(args.forward.dtype, [&](auto type) {
    with_act(args.forward.act,
             [&](auto act) { backward<decltype(type), decltype(act)::value>(args); });
  });
}

}  // namespace tilewise::CPU_CAPABILITY
