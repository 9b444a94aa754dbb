// x w^T + bias for few rows on the CPU, w in panels (linear.h). Compiled once per capability, but
// there is a kernel for AVX-512 only: float32 needs no more, bfloat16 and int8 their dot products
// (both: AMD Zen 4, Intel Sapphire Rapids and later). Elsewhere linear_runs says no.
//
// A step multiplies one word of each of R rows with the 48 words of a panel: 3 loads, R broadcasts
// and 3 R multiply-adds into 3 R <= 24 registers, the same for the three dtypes, which differ in
// the multiply-add alone: 1, 2 or 4 products a lane. Tasks are panels times groups of 64 rows; the
// steps go in chunks whose weights stay in L2 while all rows of the group pass over them. Panels
// follow each other in memory, so that the CPU fetches ahead by itself: asking it to gained nothing
// at 32 rows and lost at 4. Each sum is made in the order of k, whatever the rows and threads.
//
// Memory: each panel is read once for 64 rows, x once per panel from cache, y is written once.

#include "linear.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#ifdef CPU_CAPABILITY_AVX512
#include <immintrin.h>
// On `block` for float32 as well, where no compiler has a use for these instructions.
#define TILEWISE_DOT __attribute__((target("avx512bf16,avx512vnni")))
#endif

namespace tilewise::CPU_CAPABILITY {

#ifndef CPU_CAPABILITY_AVX512

bool linear_runs(c10::ScalarType) { return false; }
void linear(const Linear&) {}

#else

namespace {

constexpr int kVectors = kPanel / 16;
constexpr int kMostRows = 8;        // of a block: 8 x 3 sums in registers
constexpr int64_t kGroup = 64;      // rows of a task
constexpr int64_t kChunk = 256;     // steps: 48 KB of weights
constexpr int64_t kGrain = 131072;  // words per thread below which another costs more than it gives
constexpr float kTiny = 0x1p-100f;  // an int8 row with nothing larger counts as zero

// ---- the multiply-adds ------------------------------------------------------------------------

struct Float32 {
  using Sum = __m512;
  TILEWISE_DOT static Sum load(const int32_t* from) { return _mm512_loadu_ps(from); }
  TILEWISE_DOT static void store(int32_t* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  TILEWISE_DOT static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

struct Bfloat16 : Float32 {
  TILEWISE_DOT static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

struct Int8 {
  using Sum = __m512i;
  TILEWISE_DOT static Sum load(const int32_t* from) { return _mm512_loadu_si512(from); }
  TILEWISE_DOT static void store(int32_t* to, Sum sum) { _mm512_storeu_si512(to, sum); }
  TILEWISE_DOT static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, x, w);
  }
};

// ---- the micro-kernel -------------------------------------------------------------------------

// `steps` steps of R rows with one panel, on top of the sums [R][48]. x_stride in bytes.
template <typename W, int R>
TILEWISE_DOT void block(const char* x, int64_t x_stride, const int32_t* w, int64_t steps,
                        int32_t* sums) {
  typename W::Sum sum[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) sum[r][c] = W::load(sums + r * kPanel + c * 16);
  }
  for (int64_t k = 0; k < steps; ++k) {
    __m512i weights[kVectors];
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) weights[c] = _mm512_loadu_si512(w + k * kPanel + c * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t word;
      std::memcpy(&word, x + r * x_stride + k * 4, 4);
      const __m512i same = _mm512_set1_epi32(word);
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) sum[r][c] = W::dot(sum[r][c], same, weights[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) W::store(sums + r * kPanel + c * 16, sum[r][c]);
  }
}

using Block = void (*)(const char*, int64_t, const int32_t*, int64_t, int32_t*);

template <typename W, int... R>
constexpr std::array<Block, sizeof...(R)> blocks_of(std::integer_sequence<int, R...>) {
  return {block<W, R + 1>...};
}

// The sums [rows][48] of one panel. x_stride in bytes.
template <typename W>
void multiply(const char* x, int64_t x_stride, int64_t rows, const int32_t* w, int64_t words,
              int32_t* sums) {
  static constexpr auto kBlocks = blocks_of<W>(std::make_integer_sequence<int, kMostRows>());
  const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
  for (int64_t k = 0; k < words; k += kChunk) {
    const int64_t steps = std::min(kChunk, words - k);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = rows * b / blocks, last = rows * (b + 1) / blocks;
      kBlocks[last - first - 1](x + first * x_stride + k * 4, x_stride, w + k * kPanel, steps,
                                sums + first * kPanel);
    }
  }
}

// ---- reading x, writing y ---------------------------------------------------------------------

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// 16 elements as float32; those not in `lanes` are 0.
inline __m512 read(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
inline __m512 read(const c10::Half* from, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}
inline __m512 read(const c10::BFloat16* from, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void write(float* to, __m512 value, __mmask16 lanes) {
  _mm512_mask_storeu_ps(to, lanes, value);
}
inline void write(c10::Half* to, __m512 value, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void write(c10::BFloat16* to, __m512 value, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, at::vec::cvtfp32_bf16(value));
}

// A row of x in float32 or bfloat16 words, the last of them filled up with zeros.
template <typename X, typename W>
void convert_row(const X* x, int64_t k, int64_t padded, W* to) {
  for (int64_t i = 0; i < padded; i += 16) {
    write(to + i, read(x + i, first_lanes(k - i)), first_lanes(padded - i));
  }
}

// A row of x as round(127 x / max|x|) + 128 in bytes; returns max|x| / 127, or NaN where x is not
// finite. The maximum is of bit patterns, in which NaN is above infinity.
template <typename X>
float quantise_row(const X* x, int64_t k, int64_t padded, uint8_t* to) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __m512i value = _mm512_castps_si512(read(x + i, first_lanes(k - i)));
    bits = _mm512_max_epi32(bits, _mm512_and_si512(value, magnitude));
  }
  const float largest = c10::bit_cast<float>(_mm512_reduce_max_epi32(bits));
  const bool plain = std::isfinite(largest) && largest >= kTiny;
  const __m512 factor = _mm512_set1_ps(plain ? 127.f / largest : 0.f);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 scaled = _mm512_mul_ps(read(x + i, first_lanes(k - i)), factor);
    const __m128i byte = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled));
    _mm_mask_storeu_epi8(to + i, first_lanes(padded - i), _mm_xor_si128(byte, _mm_set1_epi8(-128)));
  }
  if (plain) return largest / 127.f;
  return largest < kTiny ? 0.f : std::numeric_limits<float>::quiet_NaN();
}

// Fills args.words, and args.row_scale for int8.
template <typename X>
void prepare(const Linear& args) {
  const int64_t words = (args.k + per_word(args.dtype) - 1) / per_word(args.dtype);
  const int64_t padded = words * per_word(args.dtype);
  const int64_t grain = std::max<int64_t>(1, kGrain / 8 / args.k);
  at::parallel_for(0, args.m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
      int32_t* to = args.words + row * words;
      if (args.dtype == at::kChar) {
        args.row_scale[row] = quantise_row(x, args.k, padded, reinterpret_cast<uint8_t*>(to));
      } else if (args.dtype == at::kBFloat16) {
        convert_row(x, args.k, padded, reinterpret_cast<c10::BFloat16*>(to));
      } else {
        convert_row(x, args.k, padded, reinterpret_cast<float*>(to));
      }
    }
  });
}

// ---- one task ---------------------------------------------------------------------------------

// Turns the sums of rows [row, row + rows) and columns from `column` on into y.
template <typename X>
void finish(const Linear& args, const int32_t* sums, int64_t row, int64_t rows, int64_t column) {
  for (int64_t c = column; c < std::min(column + kPanel, args.n); c += 16) {
    const __mmask16 lanes = first_lanes(args.n - c);
    const bool int8 = args.dtype == at::kChar;
    const __m512 zero = _mm512_setzero_ps();
    const __m512 scale = int8 ? _mm512_maskz_loadu_ps(lanes, args.scale + c) : zero;
    const __m512 bias = int8 && args.bias ? _mm512_maskz_loadu_ps(lanes, args.bias + c) : zero;
    for (int64_t r = 0; r < rows; ++r) {
      const __m512i bits = _mm512_loadu_si512(sums + r * kPanel + (c - column));
      __m512 value = _mm512_castsi512_ps(bits);
      if (int8) {
        const __m512 unit = _mm512_mul_ps(scale, _mm512_set1_ps(args.row_scale[row + r]));
        value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), unit, bias);
      }
      write(static_cast<X*>(args.y) + (row + r) * args.n + c, value, lanes);
    }
  }
}

template <typename X, typename W>
void run(const Linear& args) {
  const int64_t words = (args.k + per_word(args.dtype) - 1) / per_word(args.dtype);
  const bool in_place = reads_x_in_place(args);
  if (!in_place) prepare<X>(args);
  const char* x = static_cast<const char*>(in_place ? args.x : args.words);
  const int64_t x_stride = in_place ? args.x_stride * static_cast<int64_t>(sizeof(X)) : words * 4;
  const int64_t panels = (args.n + kPanel - 1) / kPanel, groups = (args.m + kGroup - 1) / kGroup;
  const int64_t work = words * kPanel * std::min(args.m, kGroup);
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  at::parallel_for(0, panels * groups, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kGroup * kPanel];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / groups, group = task % groups;
      const int64_t row = args.m * group / groups;
      const int64_t rows = args.m * (group + 1) / groups - row;
      const auto* start = static_cast<const int32_t*>(args.panels) + panel * (1 + words) * kPanel;
      for (int64_t r = 0; r < rows; ++r) std::memcpy(sums + r * kPanel, start, kPanel * 4);
      multiply<W>(x + row * x_stride, x_stride, rows, start + kPanel, words, sums);
      finish<X>(args, sums, row, rows, panel * kPanel);
    }
  });
}

template <typename X>
void run_dtype(const Linear& args) {
  if (args.dtype == at::kChar) return run<X, Int8>(args);
  if (args.dtype == at::kBFloat16) return run<X, Bfloat16>(args);
  run<X, Float32>(args);
}

}  // namespace

bool linear_runs(c10::ScalarType dtype) {
  if (dtype == at::kChar) return __builtin_cpu_supports("avx512vnni");
  // oneDNN multiplies bfloat16 on AMX, faster than these dot products can.
  if (dtype == at::kBFloat16) {
    return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16");
  }
  return true;
}

void linear(const Linear& args) {
  if (args.x_dtype == at::kBFloat16) return run_dtype<c10::BFloat16>(args);
  if (args.x_dtype == at::kHalf) return run_dtype<c10::Half>(args);
  run_dtype<float>(args);
}

#endif

}  // namespace tilewise::CPU_CAPABILITY
