// Attention where all queries of a key head are one block, and no term is added to the scores. What
// attention.cpp packs and turns once for many blocks would be used once. So here scores stand on
// their sides, keys down and queries across:
//
//   S^T = k q^T;  P^T as in attention.cpp;  out = P v
//   dP^T = v g^T;  dS^T as in attention.cpp;  dk = dS^T q;  dv = P^T g;  dq = dS k
//
// k and v are read where they lie, dk and dv come out as they are written, softmax needs no sums
// across a vector, and all that is turned is q, g and, rounded, P or dS. attention.cpp includes
// this.
#pragma once

#include "attention_block.h"
#include "attention_few.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

constexpr int64_t kSome = 128;  // keys at a time: 64 measure slower

// Queries up to which those of attention_few.h measure faster still.
template <typename T>
constexpr int64_t kFewerThanShort = kPerWord<T> == 1 ? 16 : 8;

template <typename T>
bool is_short(const Attention& args) {
  const bool plain = args.mask.kind == Added::none && args.bias.kind == Added::none &&
                     args.slopes == nullptr && args.softcap == 0.0f;
  return plain && are_few(args, kRows) && !are_few(args, kFewerThanShort<T>);
}

// One block of queries, the scores of its keys [first_, last), and what products with them need.
template <typename T>
class ShortBlock {
 protected:
  ShortBlock(const Attention& args, int64_t longest)
      : attention_(args),
        queries_(args.head_dim),
        q_columns_(kRows * queries_.words()),
        staged_(kSome * filled(std::max(args.head_dim, args.value_dim))),
        in_words_(kSome / kPerWord<T> * std::max(args.head_dim, args.value_dim)),
        turned_(kSome * kRows / kPerWord<T>),
        scores_(filled(longest) * kRows),
        kept_(args.dropout ? filled(longest) * kRows : 0) {}

  template <typename F>
  static void by_some(int64_t first, int64_t last, const F& f) {
    for (int64_t j = first; j < last; j += kSome) f(j, std::min(kSome, last - j));
  }

  float* at(Floats& scores, int64_t j) { return scores.data() + (j - first_) * across_; }

  // Where keys that some query sees end; is_dead(row) tells of rows that are to see none.
  template <typename F>
  int64_t begin(const Item& item, const Block& block, const F& is_dead) {
    const int64_t last = block.size() == 0 ? block.first : std::min(block.last, item.length);
    across_ = filled(block.size());
    first_ = block.first;
    hides_ = false;
    for (int64_t i = 0; i < across_; ++i) {
      Seen seen = {0, 0};
      if (i < block.size()) {
        const Row row = row_of(attention_, item, block, i);
        mixed_[i] = mixed_row(item.seed, item.number + row.head * item.sq + row.row);
        dead_[i] = is_dead(row);
        if (!dead_[i]) seen = row.seen;
      }
      hides_ = hides_ || seen.first > first_ || seen.last < last;
      begin_[i] = static_cast<int32_t>(seen.first);
      end_[i] = static_cast<int32_t>(seen.last);
    }
    queries_.load(attention_.q, item, block);
    queries_.columns(across_, q_columns_.data());
    return last;
  }

  bool sees(int64_t i, int64_t j) const { return begin_[i] <= j && j < end_[i]; }

  float kept(int64_t i, int64_t j) const {
    return kept_at(mixed_[i], static_cast<uint32_t>(j), attention_.threshold) ? 1.0f : 0.0f;
  }

  // `count` rows of keys or values as A of products; fewer than a tile are filled up with zeros.
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

  // Rows of `scores` = keys or values [j, j + count) times columns.
  void multiply_rows(const Matrices& of, const Item& item, int64_t head, int64_t j, int64_t count,
                     int64_t width, Floats& columns, Floats& scores) {
    int64_t stride;
    const T* const a = rows(of, item, head, j, count, width, &stride);
    multiply(filled(count), across_, filled(width, kPerWord<T>), a, stride, columns.data(), kRows,
             at(scores, j), across_, false);
  }

  // to [queries][width] += the transpose of p times keys or values [j, j + count); p is in words.
  void add_turned(const float* p, const Matrices& of, const Item& item, int64_t head, int64_t j,
                  int64_t count, int64_t width, float* to) {
    constexpr int64_t words = kSome / kPerWord<T>;
    const int64_t padded = filled(count);
    for (int64_t w = 0; w * kPerWord<T> < padded; w += kTile) {
      transpose(p + w * across_, across_, across_, turned_.data() + w, words);
    }
    int64_t stride;
    const T* const from = rows(of, item, head, j, count, width, &stride);
    for (int64_t r = 0; r < padded; r += kPerWord<T>) {
      const T* const row = from + r * stride;
      pair(row, row + (kPerWord<T> - 1) * stride, width,
           in_words_.data() + r / kPerWord<T> * width);
    }
    multiply(across_, width, padded, reinterpret_cast<const T*>(turned_.data()), kSome,
             in_words_.data(), width, to, width, true);
  }

  const Attention& attention_;
  Queries<T> queries_;
  Floats q_columns_, staged_, in_words_, turned_, scores_, kept_;
  int64_t first_ = 0, across_ = 0;  // across_: queries, filled up to whole vectors
  bool hides_ = false, dead_[kRows];

 private:
  int32_t begin_[kRows], end_[kRows];  // the keys that a query sees
  uint32_t mixed_[kRows] = {};
};

// ---- forward ----------------------------------------------------------------------------------

template <typename T>
class ForwardShort : ShortBlock<T> {
  using Base = ShortBlock<T>;
  using Base::across_, Base::at, Base::first_, Base::kept_, Base::scores_;

 public:
  ForwardShort(const Attention& args, int64_t longest)
      : Base(args, longest),
        args_(args),
        words_(kSome * kRows / kPerWord<T>),
        out_(kRows * args.value_dim) {}

  void run(int64_t task) {
    const int64_t head = task % args_.heads;
    const Item& item = args_.items[task / args_.heads];
    const Block block = Blocks(args_, item, head).at(0);
    const int64_t last = this->begin(item, block, [](const Row&) { return false; });
    std::fill_n(out_.data(), across_ * args_.value_dim, 0.0f);
    std::fill_n(so_far_, kRows, SoFar());
    if (first_ < last) {
      Base::by_some(first_, last, [&](int64_t j, int64_t count) {
        this->multiply_rows(args_.k, item, head, j, count, args_.head_dim, this->q_columns_,
                            scores_);
      });
      soften(last);
      Base::by_some(first_, last,
                    [&](int64_t j, int64_t count) { weigh_values(item, head, j, count); });
    }
    for (int64_t i = 0; i < block.size(); ++i) {
      finish<T>(args_, item, row_of(args_, item, block, i), so_far_[i],
                out_.data() + i * args_.value_dim);
    }
  }

 private:
  // Scores become exp(score - peak), less what dropout drops.
  void soften(int64_t last) {
    for (int64_t j = first_; this->hides_ && j < last; ++j) {
      float* const s = at(scores_, j);
      for (int64_t i = 0; i < across_; ++i) {
        s[i] = this->sees(i, j) ? s[i] * args_.scale : kLowest;
      }
    }
    const Vec scale(this->hides_ ? 1.0f : args_.scale), lowest(kLowest);
    for (int64_t i = 0; i < across_; i += kWidth) {
      float* const s = at(scores_, first_) + i;
      Vec peak = lowest, sum(0.0f);
      for (int64_t j = 0; j < last - first_; ++j) {
        peak = larger(peak, Vec::loadu(s + j * across_) * scale);
      }
      peak = Vec::blendv(peak, Vec(0.0f), peak == lowest);
      for (int64_t j = 0; j < last - first_; ++j) {
        const Vec e = exp_nonpositive(Vec::loadu(s + j * across_) * scale - peak);
        e.store(s + j * across_);
        sum = sum + e;
      }
      float peaks[kWidth], sums[kWidth];
      peak.store(peaks);
      sum.store(sums);
      for (int64_t r = 0; r < kWidth; ++r) so_far_[i + r] = {peaks[r], sums[r]};
    }
    for (int64_t j = first_; args_.dropout && j < last; ++j) {
      for (int64_t i = 0; i < across_; ++i) at(scores_, j)[i] *= this->kept(i, j);
    }
  }

  void weigh_values(const Item& item, int64_t head, int64_t j, int64_t count) {
    float* p = at(scores_, j);
    std::fill_n(p + count * across_, (filled(count) - count) * across_, 0.0f);
    if constexpr (kPerWord<T> == 2) {
      for (int64_t r = 0; r < filled(count); r += 2) {
        const float* const two = p + r * across_;
        round_two(two, two + across_, across_, words_.data() + r / 2 * across_, nullptr, 0);
      }
      p = words_.data();
    }
    this->add_turned(p, args_.v, item, head, j, count, args_.value_dim, out_.data());
  }

  const Attention& args_;
  Floats words_, out_;
  SoFar so_far_[kRows];
};

template <typename T>
void forward_short(const Attention& args, int64_t longest) {
  run_tasks<T>(args.num_items * args.heads, [&] { return ForwardShort<T>(args, longest); });
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T>
class BackwardShort : ShortBlock<T> {
  using Base = ShortBlock<T>;
  using Base::across_, Base::at, Base::dead_, Base::first_, Base::kept_, Base::scores_;

 public:
  explicit BackwardShort(const AttentionBackward& args)
      : Base(args, args.longest),
        args_(args),
        grads_(args.value_dim),
        g_columns_(kRows * grads_.words()),
        q_rows_(kRows / kPerWord<T> * args.head_dim),
        g_rows_(kRows / kPerWord<T> * args.value_dim),
        dscores_(filled(args.longest) * kRows),
        p_(kSome * kRows / kPerWord<T>),
        ds_(kSome * kRows / kPerWord<T>),
        ds_words_(kSome * kRows / kPerWord<T>),
        dq_(kRows * args.head_dim),
        found_(kSome * std::max(args.head_dim, args.value_dim)) {}

  void run(int64_t task) {
    const int64_t head = task % args_.heads;
    const Item& item = args_.items[task / args_.heads];
    const Block block = Blocks(args_, item, head).at(0);
    const int64_t last = load(item, block);
    std::fill_n(dq_.data(), across_ * args_.head_dim, 0.0f);
    if (first_ < last) {
      Base::by_some(first_, last, [&](int64_t j, int64_t count) {
        this->multiply_rows(args_.k, item, head, j, count, args_.head_dim, this->q_columns_,
                            scores_);
        this->multiply_rows(args_.v, item, head, j, count, args_.value_dim, g_columns_, dscores_);
      });
      soften(last);
      Base::by_some(first_, last,
                    [&](int64_t j, int64_t count) { spread(item, head, j, count); });
    }
    write_dq(item, block);
    write_zeros(args_.dk, item, head, args_.head_dim, first_, last);
    write_zeros(args_.dv, item, head, args_.value_dim, first_, last);
  }

 private:
  int64_t load(const Item& item, const Block& block) {
    const int64_t last =
        this->begin(item, block, [&](const Row& row) { return is_dead(args_, item, row); });
    size_ = filled(block.size(), kPerWord<T>);
    grads_.load(args_.grad, item, block);
    for (int64_t i = 0; i < block.size(); ++i) {
      if (dead_[i]) std::fill_n(grads_.row(i), args_.value_dim, T(0));
    }
    grads_.columns(across_, g_columns_.data());
    this->queries_.in_words(size_, q_rows_.data());
    grads_.in_words(size_, g_rows_.data());
    return last;
  }

  void hide(int64_t last) {
    for (int64_t j = first_; j < last; ++j) {
      float *const s = at(scores_, j), *const ds = at(dscores_, j);
      for (int64_t i = 0; i < across_; ++i) {
        const bool seen = this->sees(i, j);
        s[i] = seen ? s[i] * args_.scale : kLowest;
        ds[i] = seen ? ds[i] : 0.0f;
      }
    }
  }

  void drop(int64_t last) {
    for (int64_t j = first_; j < last; ++j) {
      float *const kept = at(kept_, j), *const ds = at(dscores_, j);
      for (int64_t i = 0; i < across_; ++i) {
        kept[i] = this->kept(i, j);
        ds[i] *= kept[i] * args_.kept_scale;
      }
    }
  }

  // Scores become exp(score - peak); finds each query's 1 / sum and sum of P dP.
  void soften(int64_t last) {
    if (this->hides_) hide(last);
    if (args_.dropout) drop(last);
    const Vec scale(this->hides_ ? 1.0f : args_.scale), lowest(kLowest), zero(0.0f);
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
    this->add_turned(ds_words, args_.k, item, head, j, count, d, dq_.data());
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
  Queries<T> grads_;
  Floats g_columns_, q_rows_, g_rows_, dscores_, p_, ds_, ds_words_, dq_, found_;
  int64_t size_ = 0;  // queries, filled up to words
  float inverse_[kRows], dot_[kRows];
};

template <typename T>
void backward_short(const AttentionBackward& args) {
  run_tasks<T>(args.num_items * args.heads, [&] { return BackwardShort<T>(args); });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
