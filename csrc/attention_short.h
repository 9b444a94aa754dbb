// Attention backward where all queries of a key head are one block, and no term is added to the
// scores. What attention.cpp packs and turns once for many blocks would be used once. So here
// scores stand on their sides, keys down and queries across:
//
//   S^T = k q^T, dP^T = v g^T;  P^T, dS^T as in attention.cpp;  dk = dS^T q;  dv = P^T g;  dq = dS k
//
// k and v are read where they lie, dk and dv come out as they are written, softmax needs no sums
// across a vector, and all that is turned is q, g and, rounded, dS. attention.cpp includes this.
#pragma once

#include "attention_block.h"
#include "attention_few.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

constexpr int64_t kSome = 64;  // keys at a time

// Queries up to which those of attention_few.h measure faster still.
template <typename T>
constexpr int64_t kFewerThanShort = kPerWord<T> == 1 ? 16 : 8;

template <typename T>
bool is_short(const Attention& args) {
  const bool plain = args.mask.kind == Added::none && args.bias.kind == Added::none &&
                     args.slopes == nullptr && args.softcap == 0.0f;
  return plain && are_few(args, kRows) && !are_few(args, kFewerThanShort<T>);
}

template <typename T>
class BackwardShort {
 public:
  explicit BackwardShort(const AttentionBackward& args)
      : args_(args),
        queries_(args.head_dim),
        grads_(args.value_dim),
        q_columns_(kRows * queries_.words()),
        g_columns_(kRows * grads_.words()),
        q_rows_(kRows / kPerWord<T> * args.head_dim),
        g_rows_(kRows / kPerWord<T> * args.value_dim),
        staged_(kSome * std::max(queries_.words(), grads_.words())),
        key_rows_(kSome / kPerWord<T> * args.head_dim),
        scores_(filled(args.longest) * kRows),
        dscores_(filled(args.longest) * kRows),
        kept_(args.dropout ? filled(args.longest) * kRows : 0),
        p_(kSome * kRows / kPerWord<T>),
        ds_(kSome * kRows / kPerWord<T>),
        ds_words_(kSome * kRows / kPerWord<T>),
        ds_turned_(kSome * kRows / kPerWord<T>),
        dq_(kRows * args.head_dim),
        found_(kSome * std::max(args.head_dim, args.value_dim)) {}

  void run(int64_t task) {
    const int64_t head = task % args_.heads;
    const Item& item = args_.items[task / args_.heads];
    const Block block = Blocks(args_, item, head).at(0);
    const int64_t last = block.size() == 0 ? block.first : std::min(block.last, item.length);
    load(item, block);
    std::fill_n(dq_.data(), across_ * args_.head_dim, 0.0f);
    if (block.first < last) {
      by_some(block.first, last, [&](int64_t j, int64_t count) { score(item, head, j, count); });
      soften(item, block, last);
      by_some(block.first, last, [&](int64_t j, int64_t count) { spread(item, head, j, count); });
    }
    write_dq(item, block);
    write_zeros(args_.dk, item, head, args_.head_dim, block.first, last);
    write_zeros(args_.dv, item, head, args_.value_dim, block.first, last);
  }

 private:
  template <typename F>
  static void by_some(int64_t first, int64_t last, const F& f) {
    for (int64_t j = first; j < last; j += kSome) f(j, std::min(kSome, last - j));
  }

  void load(const Item& item, const Block& block) {
    size_ = filled(block.size(), kPerWord<T>);
    across_ = filled(block.size());
    queries_.load(args_.q, item, block);
    grads_.load(args_.grad, item, block);
    first_ = block.first;
    hides_ = false;
    for (int64_t i = 0; i < across_; ++i) {
      Seen seen = {0, 0};
      if (i < block.size()) {
        const Row row = row_of(args_, item, block, i);
        dead_[i] = is_dead(args_, item, row);
        if (dead_[i]) std::fill_n(grads_.row(i), args_.value_dim, T(0));
        if (!dead_[i]) seen = row.seen;
      }
      hides_ = hides_ || seen.first > block.first || seen.last < std::min(block.last, item.length);
      begin_[i] = static_cast<int32_t>(seen.first);
      end_[i] = static_cast<int32_t>(seen.last);
    }
    queries_.columns(across_, q_columns_.data());
    grads_.columns(across_, g_columns_.data());
    queries_.in_words(size_, q_rows_.data());
    grads_.in_words(size_, g_rows_.data());
  }

  // `count` rows of keys or values as A of products; fewer than kSome are filled up with zeros.
  const T* rows(const Matrices& of, const Item& item, int64_t head, int64_t j, int64_t count,
                int64_t width, int64_t* stride) {
    const T* const from = rows_of<T>(of, item, item.k_row + j, head);
    *stride = of.row;
    if (count % kTile == 0 && width % kPerWord<T> == 0 && of.row >= width) return from;
    *stride = filled(width, kPerWord<T>);
    T* const to = reinterpret_cast<T*>(staged_.data());
    std::fill_n(to, filled(count) * *stride, T(0));
    for (int64_t r = 0; r < count; ++r) std::copy_n(from + r * of.row, width, to + r * *stride);
    return to;
  }

  float* at(Floats& scores, int64_t j) { return scores.data() + (j - first_) * across_; }

  void score(const Item& item, int64_t head, int64_t j, int64_t count) {
    const int64_t d = args_.head_dim, dv = args_.value_dim;
    int64_t stride;
    const T* a = rows(args_.k, item, head, j, count, d, &stride);
    multiply(filled(count), across_, filled(d, kPerWord<T>), a, stride, q_columns_.data(), kRows,
             at(scores_, j), across_, false);
    a = rows(args_.v, item, head, j, count, dv, &stride);
    multiply(filled(count), across_, filled(dv, kPerWord<T>), a, stride, g_columns_.data(), kRows,
             at(dscores_, j), across_, false);
  }

  void hide(int64_t last) {
    for (int64_t j = first_; j < last; ++j) {
      float *const s = at(scores_, j), *const ds = at(dscores_, j);
      const auto key = static_cast<int32_t>(j);
      for (int64_t i = 0; i < across_; ++i) {
        const bool seen = begin_[i] <= key && key < end_[i];
        s[i] = seen ? s[i] : kLowest;
        ds[i] = seen ? ds[i] : 0.0f;
      }
    }
  }

  void drop(const Item& item, const Block& block, int64_t last) {
    for (int64_t i = 0; i < across_; ++i) {
      const int64_t r = std::min(i, block.size() - 1);
      const Row row = row_of(args_, item, block, r);
      mixed_[i] = mixed_row(item.seed, item.number + row.head * item.sq + row.row);
    }
    for (int64_t j = first_; j < last; ++j) {
      float *const kept = at(kept_, j), *const ds = at(dscores_, j);
      for (int64_t i = 0; i < across_; ++i) {
        kept[i] = kept_at(mixed_[i], static_cast<uint32_t>(j), args_.threshold) ? 1.0f : 0.0f;
        ds[i] *= kept[i] * args_.kept_scale;
      }
    }
  }

  // Scores become exp(score - peak); finds each query's 1 / sum and sum of P dP.
  void soften(const Item& item, const Block& block, int64_t last) {
    if (hides_) hide(last);
    if (args_.dropout) drop(item, block, last);
    const Vec scale(args_.scale), lowest(kLowest), zero(0.0f);
    for (int64_t i = 0; i < across_; i += kWidth) {
      float *s = at(scores_, first_) + i, *ds = at(dscores_, first_) + i;
      Vec peak = lowest, sum(0.0f), dot(0.0f);
      for (int64_t j = 0; j < last - first_; ++j) {
        peak = larger(peak, Vec::loadu(s + j * across_) * scale);
      }
      peak = Vec::blendv(peak, zero, peak == lowest);
      for (int64_t j = 0; j < last - first_; ++j) {
        const Vec e = exp_nonpositive(Vec::loadu(s + j * across_) * scale - peak);
        e.store(s + j * across_);
        sum = sum + e;
        dot = at::vec::fmadd(e, Vec::loadu(ds + j * across_), dot);
      }
      const Vec inverse = Vec::blendv(Vec(1.0f) / sum, zero, sum == zero);
      inverse.store(inverse_ + i);
      (dot * inverse).store(dot_ + i);
    }
  }

  // What keys [j, j + count) give dq, and their dk and dv.
  void spread(const Item& item, int64_t head, int64_t j, int64_t count) {
    const int64_t d = args_.head_dim, dv = args_.value_dim, padded = filled(count);
    for (int64_t r = 0; r < padded; ++r) differentiate(j + r, r < count);
    float *p = at(scores_, j), *ds = at(dscores_, j), *ds_words = ds;
    if constexpr (kPerWord<T> == 2) {
      round_row(p, padded * across_, reinterpret_cast<T*>(p_.data()));
      T* const rows = reinterpret_cast<T*>(ds_.data());
      for (int64_t r = 0; r < padded; r += 2) {
        const float* const two = ds + r * across_;
        round_two(two, two + across_, across_, ds_words_.data() + r / 2 * across_,
                  rows + r * across_, across_);
      }
      p = p_.data(), ds = ds_.data(), ds_words = ds_words_.data();
    }
    multiply(padded, dv, size_, reinterpret_cast<const T*>(p), across_, g_rows_.data(), dv,
             found_.data(), dv, false);
    write(args_.dv, item, head, j, count, dv, args_.kept_scale);
    multiply(padded, d, size_, reinterpret_cast<const T*>(ds), across_, q_rows_.data(), d,
             found_.data(), d, false);
    write(args_.dk, item, head, j, count, d, args_.scale);
    add_dq(item, head, j, count, ds_words);
  }

  // dq += dS k of keys [j, j + count), from dS^T in words.
  void add_dq(const Item& item, int64_t head, int64_t j, int64_t count, const float* ds_words) {
    const int64_t d = args_.head_dim, padded = filled(count);
    constexpr int64_t words = kSome / kPerWord<T>;
    for (int64_t w = 0; w < words && w * kPerWord<T> < padded; w += kTile) {
      transpose(ds_words + w * across_, across_, across_, ds_turned_.data() + w, words);
    }
    int64_t stride;
    const T* const keys = rows(args_.k, item, head, j, count, d, &stride);
    for (int64_t r = 0; r < padded; r += kPerWord<T>) {
      const T* const key = keys + r * stride;
      pair(key, key + (kPerWord<T> - 1) * stride, d, key_rows_.data() + r / kPerWord<T> * d);
    }
    multiply(across_, d, padded, reinterpret_cast<const T*>(ds_turned_.data()), kSome,
             key_rows_.data(), d, dq_.data(), d, true);
  }

  // exp(score - peak) and dP^T of key j become P^T, less what dropout drops, and dS^T.
  void differentiate(int64_t j, bool real) {
    float *const s = at(scores_, j), *const ds = at(dscores_, j);
    for (int64_t i = 0; i < across_; i += kWidth) {
      const Vec p = Vec::loadu(s + i) * Vec::loadu(inverse_ + i);
      const Vec g = p * (Vec::loadu(ds + i) - Vec::loadu(dot_ + i));
      const Vec left = args_.dropout && real ? p * Vec::loadu(at(kept_, j) + i) : p;
      (real ? g : Vec(0.0f)).store(ds + i);
      (real ? left : Vec(0.0f)).store(s + i);
    }
  }

  void write(const Matrices& of, const Item& item, int64_t head, int64_t j, int64_t count,
             int64_t width, float factor) {
    T* const to = rows_of<T>(of, item, item.k_row + j, head);
    for (int64_t r = 0; r < count; ++r) {
      write_row(found_.data() + r * width, factor, width, to + r * of.row);
    }
  }

  static void write_zeros(const Matrices& of, const Item& item, int64_t head, int64_t width,
                          int64_t first, int64_t last) {
    T* const to = rows_of<T>(of, item, item.k_row, head);
    for (int64_t j = 0; j < first; ++j) std::fill_n(to + j * of.row, width, T(0));
    for (int64_t j = std::max(first, last); j < item.sk; ++j) {
      std::fill_n(to + j * of.row, width, T(0));
    }
  }

  void write_dq(const Item& item, const Block& block) {
    for (int64_t i = 0; i < block.size(); ++i) {
      const Row row = row_of(args_, item, block, i);
      T* const to = rows_of<T>(args_.dq, item, item.q_row + row.row, row.head);
      if (dead_[i]) std::fill_n(to, args_.head_dim, T(0));
      if (!dead_[i]) write_row(dq_.data() + i * args_.head_dim, args_.scale, args_.head_dim, to);
    }
  }

  const AttentionBackward& args_;
  Queries<T> queries_, grads_;
  Floats q_columns_, g_columns_, q_rows_, g_rows_, staged_, key_rows_;
  Floats scores_, dscores_, kept_, p_, ds_, ds_words_, ds_turned_, dq_, found_;
  int64_t first_ = 0, size_ = 0, across_ = 0;  // queries, filled up for products, and for vectors
  bool hides_ = false, dead_[kRows];
  int32_t begin_[kRows], end_[kRows];  // the keys that a query sees
  uint32_t mixed_[kRows];
  float inverse_[kRows], dot_[kRows];
};

template <typename T>
void backward_short(const AttentionBackward& args) {
  run_tasks<T>(args.num_items * args.heads, [&] { return BackwardShort<T>(args); });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
