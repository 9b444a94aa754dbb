// Attention of so few queries to a key head that packing keys would cost more than the products:
// each key and value is read where it lies, by all of the queries together. Formulas and masks are
// those of attention.cpp, which includes this; P and dS stay in float32.
#pragma once

#include <vector>

#include "attention_block.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// Queries (heads of a group x Sq) up to which this measures faster.
template <typename T>
constexpr int64_t kFewForward = kPerWord<T> == 1 ? 32 : 8;
template <typename T>
constexpr int64_t kFewBackward = kPerWord<T> == 1 ? 32 : 16;

inline bool are_few(const Attention& args, int64_t limit) {
  for (int64_t i = 0; i < args.num_items; ++i) {
    if (args.items[i].sq * args.group > limit) return false;
  }
  return true;
}

// Pointers to rows; the last is repeated up to a multiple of four.
template <typename T>
class RowsOf {
 public:
  explicit RowsOf(int64_t longest) : at_(filled(longest)) {}
  void locate(const T* first, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < filled(count, 4); ++i) at_[i] = first + std::min(i, count - 1) * stride;
  }
  const T** operator+(int64_t i) { return at_.data() + i; }

 private:
  std::vector<const T*> at_;
};

// All queries of a key head, and the keys that one of them sees.
inline Block block_of(const Attention& args, const Item& item, int64_t head) {
  const Seen seen = seen_by(args, item, 0, item.sq);
  return {head * args.group, args.group, 0, item.sq, seen.first, seen.last};
}

template <typename T>
void locate(const Matrices& from, const Attention& args, const Item& item, const Block& block,
            const T** to) {
  for (int64_t i = 0; i < block.size(); ++i) {
    const Row row = row_of(args, item, block, i);
    to[i] = rows_of<T>(from, item, item.q_row + row.row, row.head);
  }
}

// ---- forward ----------------------------------------------------------------------------------

template <typename T>
class ForwardFew {
 public:
  explicit ForwardFew(const Attention& args)
      : args_(args),
        width_(filled(args.value_dim)),
        keys_(kAttentionKeys),
        values_(kAttentionKeys),
        scores_(kFewForward<T> * kAttentionKeys),
        kept_(kAttentionKeys),
        out_(kFewForward<T> * width_) {}

  void run(int64_t task) {
    const int64_t head = task % args_.heads;
    const Item& item = args_.items[task / args_.heads];
    const Block block = block_of(args_, item, head);
    const T* queries[kFewForward<T>];
    locate(args_.q, args_, item, block, queries);
    std::fill(so_far_, so_far_ + kFewForward<T>, SoFar());
    for (int64_t first = block.first; first < block.last; first += kAttentionKeys) {
      const int64_t count = std::min(kAttentionKeys, block.last - first);
      keys_.locate(rows_of<T>(args_.k, item, item.k_row + first, head), args_.k.row, count);
      values_.locate(rows_of<T>(args_.v, item, item.k_row + first, head), args_.v.row, count);
      attend(item, block, queries, first, count);
    }
    for (int64_t i = 0; i < block.size(); ++i) {
      finish<T>(args_, item, row_of(args_, item, block, i), so_far_[i], out_.data() + i * width_);
    }
  }

 private:
  void attend(const Item& item, const Block& block, const T* const* queries, int64_t first,
              int64_t count) {
    float* const s = scores_.data();
    dots(queries, block.size(), keys_ + 0, values_ + 0, count, args_.head_dim, s, kAttentionKeys);
    for (int64_t i = 0; i < block.size(); ++i) {
      soften(args_, item, row_of(args_, item, block, i), first, filled(count),
             s + i * kAttentionKeys, kept_.data(), out_.data() + i * width_, args_.value_dim,
             so_far_[i]);
    }
    in_groups<4>(block.size(), [&](auto some, int64_t i) {
      weigh<some()>(s + i * kAttentionKeys, kAttentionKeys, values_ + 0, count, args_.value_dim,
                    out_.data() + i * width_, width_, first > block.first);
    });
  }

  const Attention& args_;
  int64_t width_;
  RowsOf<T> keys_, values_;
  Floats scores_, kept_, out_;
  SoFar so_far_[kFewForward<T>];
};

template <typename T>
void forward_few(const Attention& args) {
  run_tasks<T>(args.num_items * args.heads, [&] { return ForwardFew<T>(args); });
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T>
class BackwardFew {
 public:
  explicit BackwardFew(const AttentionBackward& args)
      : args_(args),
        stride_(filled(args.longest) + kTile),  // not a power of two, which would crowd the cache
        width_(filled(std::max(args.head_dim, args.value_dim))),
        keys_(args.longest),
        values_(args.longest),
        scores_(kFewBackward<T> * stride_),
        dscores_(kFewBackward<T> * stride_),
        tanh_(args.softcap == 0.0f ? 0 : stride_),
        kept_(stride_),
        rows_(kFewBackward<T> * width_) {}

  // Items and heads that share rows of dbias belong to one task, which takes them in order.
  void run(int64_t task) {
    const int64_t head = args_.share_heads ? 0 : task % args_.heads;
    const int64_t item = args_.share_items ? 0 : args_.share_heads ? task : task / args_.heads;
    for (int64_t i = item; i < (args_.share_items ? args_.num_items : item + 1); ++i) {
      for (int64_t h = head; h < (args_.share_heads ? args_.heads : head + 1); ++h) {
        differentiate(args_.items[i], h);
      }
    }
  }

 private:
  void differentiate(const Item& item, int64_t head) {
    const Block block = block_of(args_, item, head);
    const int64_t first = block.first, count = block.last - first;
    const T *queries[kFewBackward<T>], *grads[kFewBackward<T>];
    locate(args_.q, args_, item, block, queries);
    locate(args_.grad, args_, item, block, grads);
    if (count > 0) {
      keys_.locate(rows_of<T>(args_.k, item, item.k_row + first, head), args_.k.row, count);
      values_.locate(rows_of<T>(args_.v, item, item.k_row + first, head), args_.v.row, count);
      dots(queries, block.size(), keys_ + 0, values_ + 0, count, args_.head_dim, scores_.data(),
           stride_);
      dots(grads, block.size(), values_ + 0, keys_ + 0, count, args_.value_dim, dscores_.data(),
           stride_);
    }
    for (int64_t i = 0; i < block.size() && count > 0; ++i) soften_row(item, block, i, count);
    write_dq(item, block, count);
    write_keys(args_.dk, item, block, head, queries, args_.head_dim, dscores_.data(), args_.scale);
    write_keys(args_.dv, item, block, head, grads, args_.value_dim, scores_.data(),
               args_.kept_scale);
  }

  void soften_row(const Item& item, const Block& block, int64_t i, int64_t count) {
    const Row row = row_of(args_, item, block, i);
    float* const s = scores_.data() + i * stride_;
    float* const ds = dscores_.data() + i * stride_;
    dead_[i] = is_dead(args_, item, row);
    if (dead_[i]) {
      std::fill_n(s, count, 0.0f);
      std::fill_n(ds, count, 0.0f);
    } else {
      soften(args_, item, row, 0, block.first, filled(count), s, ds, tanh_.data(), kept_.data());
    }
  }

  void write_dq(const Item& item, const Block& block, int64_t count) {
    in_groups<4>(count > 0 ? block.size() : 0, [&](auto some, int64_t i) {
      weigh<some()>(dscores_.data() + i * stride_, stride_, keys_ + 0, count, args_.head_dim,
                    rows_.data() + i * width_, width_, false);
    });
    for (int64_t i = 0; i < block.size(); ++i) {
      const Row row = row_of(args_, item, block, i);
      T* const to = rows_of<T>(args_.dq, item, item.q_row + row.row, row.head);
      if (count == 0 || dead_[i]) {
        std::fill_n(to, args_.head_dim, T(0));
      } else {
        write_row(rows_.data() + i * width_, args_.scale, args_.head_dim, to);
      }
    }
  }

  // Rows j of `of` = factor times the sum over queries i of weights[i][j] from[i].
  void write_keys(const Matrices& of, const Item& item, const Block& block, int64_t head,
                  const T* const* from, int64_t width, const float* weights, float factor) {
    T* const to = rows_of<T>(of, item, item.k_row, head);
    for (int64_t j = 0; j < block.first; ++j) std::fill_n(to + j * of.row, width, T(0));
    for (int64_t i = 0; i < block.size() && block.last > block.first; ++i) {
      widen(from[i], dead_[i] ? 0.0f : factor, width, rows_.data() + i * width_);
    }
    spread(weights, stride_, rows_.data(), width_, block.size(), block.last - block.first, width,
           to + block.first * of.row, of.row);
    const int64_t rest = std::max(block.last, block.first);
    for (int64_t j = rest; j < item.sk; ++j) std::fill_n(to + j * of.row, width, T(0));
  }

  static void widen(const T* from, float factor, int64_t width, float* to) {
    if (factor == 0.0f) return std::fill_n(to, width, 0.0f), void();
    for (int64_t d = 0; d < width; d += kWidth) {
      const Vec row = d + kWidth <= width ? read(from + d) : read(from + d, width - d);
      (row * Vec(factor)).store(to + d);
    }
  }

  const AttentionBackward& args_;
  int64_t stride_, width_;
  RowsOf<T> keys_, values_;
  Floats scores_, dscores_, tanh_, kept_, rows_;
  bool dead_[kFewBackward<T>];
};

template <typename T>
void backward_few(const AttentionBackward& args) {
  const int64_t items = args.share_items ? 1 : args.num_items;
  run_tasks<T>(items * (args.share_heads ? 1 : args.heads), [&] { return BackwardFew<T>(args); });
}

}  // namespace
}  // namespace tilewise::CPU_CAPABILITY
