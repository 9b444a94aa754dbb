// What attention's forward and backward on the CPU share: operands of the matrix products, and the
// scores of a row. Included by attention.cpp, which is compiled once per capability.
//
// Products are those of oneDNN inside torch (brgemm), C = A B in float32 with A by rows. B is in
// words of 32 bits: [K][N] of float32, [K / 2][N] of two bfloat16 that follow each other in K.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "dropout.h"
#include "normaliser.h"
#include "row_products.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

using Floats = RowBuffer<float>;
constexpr int64_t kTile = 16;  // to a multiple of which lengths and widths are filled up
constexpr int64_t kRows = 64;  // queries of a block
constexpr float kLowest = -std::numeric_limits<float>::infinity();

template <typename T>
constexpr int64_t kPerWord = 4 / static_cast<int64_t>(sizeof(T));

inline int64_t filled(int64_t n, int64_t unit = kTile) { return (n + unit - 1) / unit * unit; }

template <typename T>
T* rows_of(const Matrices& of, const Item& item, int64_t first, int64_t head) {
  return static_cast<T*>(of.data) + item.batch * of.batch + head * of.head + first * of.row;
}

// ---- products ---------------------------------------------------------------------------------

template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; !add && i < m; ++i) std::fill(c + i * ldc, c + i * ldc + n, 0.0f);
    return;
  }
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, reinterpret_cast<const T*>(b), c,
                              kPerWord<T> == 2);
}

// Keys in tiles: f(first, last, offset of the first in a row of its tile).
template <typename F>
void by_tiles(int64_t first, int64_t last, const F& f) {
  while (first < last) {
    const int64_t end = std::min(last, (first / kAttentionKeys + 1) * kAttentionKeys);
    f(first, end);
    first = end;
  }
}

// ---- operands ---------------------------------------------------------------------------------

// Two rows in words; of float32, which has one number a word, a alone.
template <typename T>
void pair(const T* a, const T* b, int64_t width, float* to) {
  if constexpr (kPerWord<T> == 1) {
    std::memcpy(to, a, width * sizeof(T));
  } else {
    const auto* low = reinterpret_cast<const uint16_t*>(a);
    const auto* high = reinterpret_cast<const uint16_t*>(b);
    auto* const words = reinterpret_cast<uint32_t*>(to);
    for (int64_t j = 0; j < width; ++j) {
      words[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
    }
  }
}

// 16 rows of `words` words (a multiple of 16) as columns.
inline void transpose(const float* from, int64_t from_stride, int64_t words, float* to,
                      int64_t to_stride) {
  for (int64_t w = 0; w < words; w += kTile) {
    at::vec::transpose_mxn<float, kTile, kTile>(from + w, from_stride, to + w * to_stride,
                                                to_stride);
  }
}

// Keys or values of one head as B of products: `columns` [tile][words of the width][keys of the
// tile], `rows` [words of the keys][width]. Those outside [begin, end) are zero.
template <typename T>
class Keys {
 public:
  Keys(int64_t longest, int64_t width, bool columns, bool rows)
      : width_(width),
        words_(filled((width + kPerWord<T> - 1) / kPerWord<T>)),
        stride_(std::min(room_for_keys(longest), kAttentionKeys)),
        columns_(columns ? room_for_keys(longest) * words_ : 0),
        rows_(rows ? room_for_keys(longest) * width : 0),
        staged_(kTile * words_) {
    std::memset(staged_.data(), 0, kTile * words_ * sizeof(float));
    has_columns_ = columns;
    has_rows_ = rows;
  }

  void pack(const T* x, int64_t stride, int64_t begin, int64_t end) {
    const bool fits = width_ == words_ * kPerWord<T> && stride % kPerWord<T> == 0;
    for (int64_t j = begin / kTile * kTile; j < end; j += kTile) {
      const bool in_place = fits && j >= begin && j + kTile <= end;
      const T* const rows = in_place ? x + j * stride : stage(x, stride, j, begin, end);
      const int64_t step = in_place ? stride : words_ * kPerWord<T>;
      if (has_columns_) {
        transpose(reinterpret_cast<const float*>(rows), step / kPerWord<T>, words_,
                  columns_.data() + column(j), stride_);
      }
      for (int64_t r = 0; has_rows_ && r < kTile; r += kPerWord<T>) {
        pair(rows + r * step, rows + (r + kPerWord<T> - 1) * step, width_,
             rows_.data() + row(j + r));
      }
    }
  }

  // c [m][keys first .. last) = a [m][width] times the keys, c beginning with key `origin`.
  void by_columns(const T* a, int64_t lda, int64_t m, int64_t first, int64_t last, float* c,
                  int64_t ldc) {
    const int64_t origin = first;
    by_tiles(first, last, [&](int64_t from, int64_t to) {
      multiply(m, to - from, filled(width_, kPerWord<T>), a, lda, columns_.data() + column(from),
               stride_, c + from - origin, ldc, false);
    });
  }

  // c [m][width] (+)= a [m][keys first .. last) times the rows; a begins with key `first`.
  void by_rows(const T* a, int64_t lda, int64_t m, int64_t first, int64_t last, float* c,
               int64_t ldc, bool add) {
    const int64_t origin = first;
    by_tiles(first, last, [&](int64_t from, int64_t to) {
      multiply(m, width_, to - from, a + from - origin, lda, rows_.data() + row(from), width_, c,
               ldc, add || from > origin);
    });
  }

 private:
  // A copy of rows first .. first + 16, filled up with zeros.
  const T* stage(const T* x, int64_t stride, int64_t first, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < kTile; ++r) {
      T* const to = reinterpret_cast<T*>(staged_.data() + r * words_);
      const bool real = first + r >= begin && first + r < end;
      if (real) std::memcpy(to, x + (first + r) * stride, width_ * sizeof(T));
      if (!real) std::memset(to, 0, width_ * sizeof(T));
    }
    return reinterpret_cast<const T*>(staged_.data());
  }
  int64_t row(int64_t j) const { return j / kPerWord<T> * width_; }
  int64_t column(int64_t j) const {
    return j / kAttentionKeys * kAttentionKeys * words_ + j % kAttentionKeys;
  }

  int64_t width_, words_, stride_;
  bool has_columns_, has_rows_;
  Floats columns_, rows_, staged_;
};

// ---- blocks of queries ------------------------------------------------------------------------

// `heads` query heads from `head` on, and of each `rows` queries from `row` on; they see keys
// [first, last) or fewer.
struct Block {
  int64_t head, heads, row, rows;
  int64_t first, last;
  int64_t size() const { return heads * rows; }
};

// The keys of an item that query `row` sees by causality, window and length.
struct Seen {
  int64_t first, last;
};

inline Seen seen_by(const Attention& args, const Item& item, int64_t row) {
  const int64_t at = row + item.sk - item.sq;
  const int64_t first = args.left < 0 ? 0 : std::clamp<int64_t>(at - args.left, 0, item.length);
  const int64_t last = args.right < 0 ? item.length : std::min(at + args.right + 1, item.length);
  return {first, std::max(first, last)};
}

// All keys that some query of [row, row + rows) sees.
inline Seen seen_by(const Attention& args, const Item& item, int64_t row, int64_t rows) {
  const Seen top = seen_by(args, item, row), bottom = seen_by(args, item, row + rows - 1);
  return {top.first, std::max(top.first, bottom.last)};
}

// The blocks of one key head's queries, heads first: short queries of several heads share one.
class Blocks {
 public:
  Blocks(const Attention& args, const Item& item, int64_t head)
      : args_(args), item_(item), first_head_(head * args.group) {
    heads_ = std::clamp<int64_t>(kRows / std::max<int64_t>(item.sq, 1), 1, args.group);
    of_rows_ = (args.group + heads_ - 1) / heads_;
  }
  int64_t count() const { return of_rows_ * ((item_.sq + kRows - 1) / kRows); }
  int64_t of_rows() const { return of_rows_; }  // how many have the same rows of other heads

  // The keys that blocks [begin, end) see.
  Seen seen(int64_t begin, int64_t end) const {
    if (begin >= end) return {0, 0};
    const int64_t first = begin / of_rows_ * kRows;
    const int64_t last = std::min(((end - 1) / of_rows_ + 1) * kRows, item_.sq);
    return seen_by(args_, item_, first, last - first);
  }

  Block at(int64_t i) const {
    Block block;
    const int64_t head = i % of_rows_ * heads_;
    block.head = first_head_ + head;
    block.heads = std::min(heads_, args_.group - head);
    block.row = i / of_rows_ * kRows;
    block.rows = std::min(kRows, item_.sq - block.row);
    const Seen seen = seen_by(args_, item_, block.row, block.rows);
    block.first = seen.first / kTile * kTile;
    block.last = seen.first < seen.last ? filled(seen.last) : block.first;
    return block;
  }

 private:
  const Attention& args_;
  const Item& item_;
  int64_t first_head_, heads_, of_rows_;
};

// Rows of queries as A of products, [kRows][stride], filled up with zeros.
template <typename T>
class Queries {
 public:
  explicit Queries(int64_t width)
      : width_(width),
        words_(filled((width + kPerWord<T> - 1) / kPerWord<T>)),
        data_(kRows * words_) {
    std::memset(data_.data(), 0, kRows * words_ * sizeof(float));
  }
  int64_t stride() const { return words_ * kPerWord<T>; }
  T* row(int64_t i) { return reinterpret_cast<T*>(data_.data() + i * words_); }
  const T* data() { return row(0); }

  void load(const Matrices& from, const Item& item, const Block& block) {
    int64_t i = 0;
    for (int64_t h = 0; h < block.heads; ++h) {
      const T* x = rows_of<T>(from, item, item.q_row + block.row, block.head + h);
      for (int64_t r = 0; r < block.rows; ++r, ++i) {
        std::memcpy(row(i), x + r * from.row, width_ * sizeof(T));
      }
    }
    for (; i < kRows; ++i) std::memset(row(i), 0, width_ * sizeof(T));
  }

  int64_t words() const { return words_; }

  // The first `count` (a multiple of 16) rows as columns of words, [words][kRows].
  void columns(int64_t count, float* to) {
    for (int64_t r = 0; r < count; r += kTile) {
      transpose(data_.data() + r * words_, words_, words_, to + r, kRows);
    }
  }

  // The first `count` rows as words of numbers that follow each other down: [..][width].
  void in_words(int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kPerWord<T>) {
      pair(row(i), row(i + kPerWord<T> - 1), width_, to + i / kPerWord<T> * width_);
    }
  }

  // to [width][kRows] = the transpose; to has room for widths filled up to 16.
  void transposed(float* staged, float* to) {
    constexpr int64_t words = kRows / kPerWord<T>;
    const int64_t width = filled(width_);
    for (int64_t w = 0; w < words; w += kTile) {
      for (int64_t r = 0; r < kTile; ++r) {
        const int64_t i = (w + r) * kPerWord<T>;
        pair(row(i), row(i + kPerWord<T> - 1), width_, staged + r * width);
      }
      transpose(staged, width, width, to + w, words);
    }
  }

 private:
  int64_t width_, words_;
  Floats data_;
};

// to[0 .. width) = factor * from, rounded.
template <typename T>
void write_row(const float* from, float factor, int64_t width, T* to) {
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) write(to + j, Vec::loadu(from + j) * Vec(factor));
  if (j < width) write(to + j, Vec::loadu(from + j, width - j) * Vec(factor), width - j);
}

#ifdef CPU_CAPABILITY_AVX512  // a CPU for whose bfloat16 attention runs has these instructions
__attribute__((target("avx512bf16"))) inline void write_row(const float* from, float factor,
                                                            int64_t width, c10::BFloat16* to) {
  for (int64_t j = 0; j < width; j += 16) {
    const __mmask16 lanes = j + 16 <= width ? 0xFFFF : (1u << (width - j)) - 1;
    const __m512 row = _mm512_maskz_loadu_ps(lanes, from + j);
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(row, _mm512_set1_ps(factor)));
    _mm256_mask_storeu_epi16(to + j, lanes, half);
  }
}

// Two rows of numbers as words of two bfloat16, and as rows where `rows` is not null.
__attribute__((target("avx512bf16"))) inline void round_two(const float* a, const float* b,
                                                            int64_t count, float* words,
                                                            c10::BFloat16* rows, int64_t stride) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + j));
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + j));
    if (rows != nullptr) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + j), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + stride + j), high);
    }
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    _mm512_storeu_si512(words + j, _mm512_or_si512(_mm512_cvtepu16_epi32(low), upper));
  }
}

__attribute__((target("avx512bf16"))) inline void round_row(const float* from, int64_t count,
                                                            c10::BFloat16* to) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), half);
  }
}
#else
inline void round_row(const float* from, int64_t count, c10::BFloat16* to) {
  write_row(from, 1.0f, count, to);
}

inline void round_two(const float* a, const float* b, int64_t count, float* words,
                      c10::BFloat16* rows, int64_t stride) {
  c10::BFloat16 two[2][kTile];
  for (int64_t j = 0; j < count; j += kTile) {
    round_row(a + j, kTile, two[0]);
    round_row(b + j, kTile, two[1]);
    pair(two[0], two[1], kTile, words + j);
    for (int64_t r = 0; rows != nullptr && r < 2; ++r) {
      std::copy_n(two[r], kTile, rows + r * stride + j);
    }
  }
}
#endif

// ---- the scores of a row ----------------------------------------------------------------------

struct Row {
  int64_t head, row, at;  // at: its own place among the keys
  Seen seen;
};

inline Row row_of(const Attention& args, const Item& item, const Block& block, int64_t i) {
  Row row;
  row.head = block.head + i / block.rows;
  row.row = block.row + i % block.rows;
  row.at = row.row + item.sk - item.sq;
  row.seen = seen_by(args, item, row.row);
  return row;
}

inline void add(const bool* from, int64_t stride, int64_t count, float* s) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) s[j] = from[j] ? s[j] : kLowest;
  } else {
    for (int64_t j = 0; j < count; ++j) s[j] = from[j * stride] ? s[j] : kLowest;
  }
}

template <typename M>
void add(const M* from, int64_t stride, int64_t count, float* s) {
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kWidth <= count; j += kWidth) (Vec::loadu(s + j) + read(from + j)).store(s + j);
  }
  for (; j < count; ++j) s[j] += static_cast<float>(from[j * stride]);
}

// Adds a term's part for keys [first, first + count).
inline void add(const Term& term, const Item& item, const Row& row, int64_t first, int64_t count,
                float* s) {
  const int64_t at = item.batch * term.batch + row.head * term.head + row.row * term.row +
                     first * term.key;
  switch (term.kind) {
    case Added::none: return;
    case Added::boolean: return add(static_cast<const bool*>(term.data) + at, term.key, count, s);
    case Added::f32: return add(static_cast<const float*>(term.data) + at, term.key, count, s);
    case Added::bf16:
      return add(static_cast<const c10::BFloat16*>(term.data) + at, term.key, count, s);
    case Added::f16: return add(static_cast<const c10::Half*>(term.data) + at, term.key, count, s);
  }
}

inline Vec tanh_of(const Vec& x) {
  const Vec size = x.abs(), e = exp_nonpositive(size * Vec(-2.0f)), square = x * x;
  const Vec large = (Vec(1.0f) - e) / (Vec(1.0f) + e);
  Vec small = at::vec::fmadd(square, Vec(-17.0f / 315.0f), Vec(2.0f / 15.0f));
  small = at::vec::fmadd(square, small, Vec(-1.0f / 3.0f));
  small = at::vec::fmadd(square * x, small, x);
  return Vec::blendv(large.copysign(x), small, size < Vec(0.125f));
}

// Products q k^T of keys [first, first + count) become scores, -inf where hidden; count is a
// multiple of 16. tanh, if not null, keeps what softcap made of them.
inline void score(const Attention& args, const Item& item, const Row& row, int64_t first,
                  int64_t count, float* s, float* tanh) {
  const Vec scale(args.softcap == 0.0f ? args.scale : args.scale / args.softcap);
  const Vec cap(args.softcap);
  for (int64_t j = 0; j < count; j += kWidth) {
    Vec value = Vec::loadu(s + j) * scale;
    if (args.softcap != 0.0f) {
      value = tanh_of(value);
      if (tanh != nullptr) value.store(tanh + j);
      value = value * cap;
    }
    value.store(s + j);
  }
  const int64_t begin = std::clamp<int64_t>(row.seen.first - first, 0, count);
  const int64_t end = std::clamp<int64_t>(row.seen.last - first, begin, count);
  add(args.bias, item, row, first + begin, end - begin, s + begin);
  add(args.mask, item, row, first + begin, end - begin, s + begin);
  if (args.slopes != nullptr) {
    const float slope = args.slopes[row.head];
    const auto distance = static_cast<int32_t>(first - row.at);
    for (int32_t j = begin; j < end; ++j) {
      s[j] -= slope * std::fabs(static_cast<float>(distance + j));
    }
  }
  std::fill(s, s + begin, kLowest);
  std::fill(s + end, s + count, kLowest);
}

// s = exp(s - peak); returns the sum.
inline float exponentials(float* s, int64_t count, float peak) {
  const Vec top(peak);
  Vec sums(0.0f);
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec e = exp_nonpositive(Vec::loadu(s + j) - top);
    e.store(s + j);
    sums = sums + e;
  }
  return sum_of(sums);
}

// kept[j] = 1 where dropout keeps key first + j, else 0.
inline void keep(const Attention& args, const Item& item, const Row& row, int64_t first,
                 int64_t count, float* kept) {
  const uint32_t mixed = mixed_row(item.seed, item.number + row.head * item.sq + row.row);
  const auto from = static_cast<uint32_t>(first);
  for (uint32_t j = 0; j < count; ++j) {
    kept[j] = kept_at(mixed, from + j, args.threshold) ? 1.0f : 0.0f;
  }
}

// ---- softmax of a row -------------------------------------------------------------------------

constexpr float kNoGradient = -1e30f;  // rows with a smaller lse have none, as in every other way

// Of the tiles of a row until now: the largest score, the sum of exp(score - peak).
struct SoFar {
  float peak = kLowest, sum = 0.0f;
};

// Products of a tile become P, less what dropout drops; what out has so far follows the new peak.
inline void soften(const Attention& args, const Item& item, const Row& row, int64_t first,
                   int64_t count, float* s, float* kept, float* out, int64_t width, SoFar& so_far) {
  score(args, item, row, first, count, s, nullptr);
  const float before = so_far.peak, found = largest(s, count);
  const float peak = found > before ? found : before;
  const float sum = exponentials(s, count, peak == kLowest ? 0.0f : peak);  // 0 or NaN there
  if (so_far.sum != 0.0f && peak != before) {
    const float factor = std::exp(before - peak);
    for (int64_t d = 0; d < width; ++d) out[d] *= factor;
    so_far.sum *= factor;
  }
  so_far.peak = peak;
  so_far.sum += sum;
  if (args.dropout) {
    keep(args, item, row, first, count, kept);
    for (int64_t j = 0; j < count; ++j) s[j] *= kept[j];
  }
}

// Writes a row's out and lse; out is NaN where a value that a dead row hides is.
template <typename T>
void finish(const Attention& args, const Item& item, const Row& row, const SoFar& so_far,
            float* out) {
  const bool dead = so_far.sum == 0.0f;
  if (dead) std::fill_n(out, args.value_dim, 0.0f);
  write_row(out, dead ? 0.0f : args.kept_scale / so_far.sum, args.value_dim,
            rows_of<T>(args.out, item, item.q_row + row.row, row.head));
  const float base = so_far.peak == kLowest ? 0.0f : so_far.peak;
  *rows_of<float>(args.lse, item, item.q_row + row.row, row.head) = base + std::log(so_far.sum);
}

inline bool is_dead(const Attention& args, const Item& item, const Row& row) {
  return *rows_of<float>(args.lse, item, item.q_row + row.row, row.head) < kNoGradient;
}

inline void add_bias(const AttentionBackward& args, const Item& item, const Row& row, int64_t part,
                     int64_t first, int64_t count, const float* ds) {
  float* const to = args.dbias + item.batch * args.dbias_batch + row.head * args.dbias_head +
                    part * args.dbias_part + row.row * args.dbias_row + first * args.dbias_key;
  if (args.dbias_key != 0) {
    for (int64_t j = 0; j < count; ++j) to[j] += ds[j];
  } else {
    float sum = 0.0f;
    for (int64_t j = 0; j < count; ++j) sum += ds[j];
    *to += sum;
  }
}

// A row of q k^T becomes P, less what dropout drops; that of g v^T the gradient of q k^T / scale.
inline void soften(const AttentionBackward& args, const Item& item, const Row& row, int64_t part,
                   int64_t first, int64_t count, float* s, float* ds, float* tanh, float* kept) {
  score(args, item, row, first, count, s, tanh);
  const float peak = largest(s, count);
  const float sum = exponentials(s, count, peak == kLowest ? 0.0f : peak);
  const Vec inverse(sum == 0.0f ? 0.0f : 1.0f / sum);
  const int64_t begin = std::clamp<int64_t>(row.seen.first - first, 0, count);
  const int64_t end = std::clamp<int64_t>(row.seen.last - first, begin, count);
  std::fill(ds, ds + begin, 0.0f);  // a hidden value may be NaN
  std::fill(ds + end, ds + count, 0.0f);
  if (args.dropout) {
    keep(args, item, row, first, count, kept);
    for (int64_t j = 0; j < count; ++j) ds[j] *= kept[j] * args.kept_scale;
  }
  Vec dots(0.0f);
  for (int64_t j = 0; j < count; j += kWidth) {
    dots = at::vec::fmadd(Vec::loadu(s + j), Vec::loadu(ds + j), dots);
  }
  const Vec dot(sum_of(dots * inverse));
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec p = Vec::loadu(s + j) * inverse;
    (p * (Vec::loadu(ds + j) - dot)).store(ds + j);
    (args.dropout ? p * Vec::loadu(kept + j) : p).store(s + j);
  }
  if (args.dbias != nullptr) {
    add_bias(args, item, row, part, first + begin, end - begin, ds + begin);
  }
  if (args.softcap == 0.0f) return;
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec t = Vec::loadu(tanh + j), slope = Vec(1.0f) - t * t;
    (Vec::loadu(ds + j) * slope).store(ds + j);
  }
}

// ---- tasks ------------------------------------------------------------------------------------

// make() gives each thread a worker; worker(task) for all tasks, each by whichever is free.
template <typename T, typename Make>
void run_tasks(int64_t tasks, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make();
    for (int64_t task = next++; task < tasks; task = next++) worker.run(task);
    at::native::cpublas::brgemm_release(kPerWord<T> == 2);
  });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
