// Attention on the CPU. Compiled once per capability (CPU_CAPABILITY = DEFAULT, AVX2, AVX512).
//
//   forward, a block of up to 64 queries, a tile of up to 512 keys after another:
//     S = q K^T;  S = score(S);  peak' = max(peak, S);  P = exp(S - peak')
//     out = exp(peak - peak') out + P V;  sum likewise;  at the end out / sum, lse = peak + log sum
//   backward, such a block with all keys that it sees:
//     S = q K^T, dP = g V^T;  P = softmax(score(S));  dS = P (dP - sum_j P dP)
//     dq = dS K;  dK^T += q^T dS;  dV^T += g^T P
//
// Where a key head has few queries attention_few.h takes the call, where they are one block and no
// term is added to the scores attention_short.h. Else a task is one key head and a part of its
// queries. It packs the head's keys once; they, the scores and all between the products stay in
// cache. Backward finds P from the scores' own peak and sum: exp(score - lse) is as coarse as an
// lse of 1e4 in float32, and sum(P dP) is exact where one key takes all, which sum(g out) is not.
// In bfloat16 P and dS are rounded as operands of products only. The order of every sum is fixed by
// the shapes: the result is the same bits for any number of threads. NaN behaves as in softmax.cpp.

#include "attention.h"

#include "attention_block.h"
#include "attention_few.h"
#include "attention_short.h"

namespace tilewise::CPU_CAPABILITY {
namespace {

// A part of a key head's blocks, and the keys that they see.
struct Part {
  Blocks blocks;
  int64_t begin, end;
  Seen seen;
};

// Number `part` of `parts`; with `whole`, blocks of the same rows are in one part.
Part part_of(const Attention& args, const Item& item, int64_t head, int64_t part, int64_t parts,
             bool whole) {
  const Blocks blocks(args, item, head);
  const int64_t unit = whole ? blocks.of_rows() : 1, count = blocks.count() / unit;
  const int64_t begin = count * part / parts * unit, end = count * (part + 1) / parts * unit;
  return {blocks, begin, end, blocks.seen(begin, end)};
}

// Rows of a product: multiples of 8, for each size is a kernel that oneDNN compiles and keeps.
int64_t product_rows(const Block& block) { return filled(block.size(), 8); }

// ---- forward ----------------------------------------------------------------------------------

template <typename T>
class Forward {
 public:
  Forward(const Attention& args, int64_t parts, int64_t longest)
      : args_(args),
        parts_(parts),
        keys_(longest, args.head_dim, true, false),
        values_(longest, args.value_dim, false, true),
        queries_(args.head_dim),
        scores_(kRows * kAttentionKeys),
        p_(kPerWord<T> == 1 ? 0 : kRows * kAttentionKeys / 2),
        kept_(kAttentionKeys),
        out_(kRows * args.value_dim) {}

  void run(int64_t task) {
    const int64_t head = task / parts_ % args_.heads;
    const Item& item = args_.items[task / parts_ / args_.heads];
    const Part part = part_of(args_, item, head, task % parts_, parts_, false);
    const Seen seen = part.seen;
    keys_.pack(rows_of<T>(args_.k, item, item.k_row, head), args_.k.row, seen.first, seen.last);
    values_.pack(rows_of<T>(args_.v, item, item.k_row, head), args_.v.row, seen.first, seen.last);
    for (int64_t i = part.begin; i < part.end; ++i) attend(item, part.blocks.at(i));
  }

 private:
  void attend(const Item& item, const Block& block) {
    queries_.load(args_.q, item, block);
    std::fill(so_far_, so_far_ + kRows, SoFar());
    const int64_t rows = product_rows(block);
    if (block.first == block.last) std::fill(out_.data(), out_.data() + rows * args_.value_dim, 0);
    by_tiles(block.first, block.last, [&](int64_t first, int64_t last) {
      const int64_t count = last - first;
      keys_.by_columns(queries_.data(), queries_.stride(), rows, first, last, scores_.data(),
                       count);
      for (int64_t i = 0; i < block.size(); ++i) {
        float* const s = scores_.data() + i * count;
        soften(args_, item, row_of(args_, item, block, i), first, count, s, kept_.data(),
               out_.data() + i * args_.value_dim, args_.value_dim, so_far_[i]);
        if constexpr (kPerWord<T> == 2) round_row(s, count, p_row(i, count));
      }
      for (int64_t i = block.size(); i < rows; ++i) std::fill_n(p_row(i, count), count, T(0));
      values_.by_rows(p_row(0, count), count, rows, first, last, out_.data(), args_.value_dim,
                      first > block.first);
    });
    for (int64_t i = 0; i < block.size(); ++i) {
      finish<T>(args_, item, row_of(args_, item, block, i), so_far_[i],
                out_.data() + i * args_.value_dim);
    }
  }

  T* p_row(int64_t i, int64_t count) {
    return reinterpret_cast<T*>(kPerWord<T> == 1 ? scores_.data() : p_.data()) + i * count;
  }

  const Attention& args_;
  int64_t parts_;
  Keys<T> keys_, values_;
  Queries<T> queries_;
  Floats scores_, p_, kept_, out_;
  SoFar so_far_[kRows];
};

template <typename T>
void forward(const Attention& args) {
  int64_t longest = 0, blocks = 1;
  for (int64_t i = 0; i < args.num_items; ++i) {
    longest = std::max(longest, args.items[i].length);
    blocks = std::max(blocks, Blocks(args, args.items[i], 0).count());
  }
  if (is_short<T>(args)) return forward_short<T>(args, longest);
  if (are_few(args, kFewForward<T>)) return forward_few<T>(args);
  // Each part packs the keys again. Rows know nothing of each other, so parts may follow threads.
  const int64_t pairs = args.num_items * args.heads;
  const int64_t wanted = (2 * at::get_num_threads() + pairs - 1) / pairs;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, (blocks + 1) / 2);
  run_tasks<T>(pairs * parts, [&] { return Forward<T>(args, parts, longest); });
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T>
class Backward {
 public:
  explicit Backward(const AttentionBackward& args)
      : args_(args),
        room_(room_for_keys(args.longest)),
        stride_(room_ + kTile),  // not a power of two, which would crowd a part of the cache
        keys_(args.longest, args.head_dim, true, true),
        values_(args.longest, args.value_dim, true, false),
        queries_(args.head_dim),
        grads_(args.value_dim),
        queries_t_(kRows / kPerWord<T> * filled(args.head_dim)),
        grads_t_(kRows / kPerWord<T> * filled(args.value_dim)),
        staged_(kTile * filled(std::max(args.head_dim, args.value_dim))),
        scores_(kRows * stride_),
        dscores_(kRows * stride_),
        tanh_(args.softcap == 0.0f ? 0 : kRows * stride_),
        kept_(stride_),
        p_words_(kPerWord<T> == 1 ? 0 : kRows / 2 * stride_),
        ds_words_(kPerWord<T> == 1 ? 0 : kRows / 2 * stride_),
        ds_rows_(kPerWord<T> == 1 ? 0 : kRows / 2 * stride_),
        dq_(kRows * filled(args.head_dim)),
        sums_(args.partial != nullptr ? 0 : key_sums(args, args.longest)) {}

  // Items and heads that share rows of dbias belong to one task, which takes them in order.
  void run(int64_t task) {
    const int64_t part = task % args_.parts;
    task /= args_.parts;
    const int64_t head = args_.share_heads ? 0 : task % args_.heads;
    const int64_t item = args_.share_items ? 0 : args_.share_heads ? task : task / args_.heads;
    for (int64_t i = item; i < (args_.share_items ? args_.num_items : item + 1); ++i) {
      for (int64_t h = head; h < (args_.share_heads ? args_.heads : head + 1); ++h) run(i, h, part);
    }
  }

  // The sums of all parts, in order, become dk and dv.
  void add_parts(int64_t pair) {
    const int64_t size = key_sums(args_, args_.longest);
    float* const sums = args_.partial + pair * args_.parts * size;
    const Item& item = args_.items[pair / args_.heads];
    for (int64_t number = 1; number < args_.parts; ++number) {
      const Part part = part_of(args_, item, pair % args_.heads, number, args_.parts,
                                args_.share_heads);
      by_sums(part.seen, [&](int64_t first, int64_t count) {
        const float* const from = sums + number * size;
        for (int64_t j = first; j < first + count; ++j) sums[j] += from[j];
      });
    }
    finish(item, pair % args_.heads, sums);
  }

 private:
  void run(int64_t number, int64_t head, int64_t which) {
    const Item& item = args_.items[number];
    const Part part = part_of(args_, item, head, which, args_.parts, args_.share_heads);
    const Seen seen = part.seen;
    keys_.pack(rows_of<T>(args_.k, item, item.k_row, head), args_.k.row, seen.first, seen.last);
    values_.pack(rows_of<T>(args_.v, item, item.k_row, head), args_.v.row, seen.first, seen.last);
    const int64_t size = key_sums(args_, args_.longest);
    float* sums = sums_.data();
    if (args_.partial != nullptr) {
      sums = args_.partial + ((number * args_.heads + head) * args_.parts + which) * size;
    }
    by_sums(which == 0 ? Seen{0, args_.longest} : seen, [&](int64_t first, int64_t count) {
      std::fill_n(sums + first, count, 0.0f);
    });
    part_ = which;
    for (int64_t i = part.begin; i < part.end; ++i) differentiate(item, part.blocks.at(i), sums);
    if (args_.partial == nullptr) finish(item, head, sums);
  }

  void differentiate(const Item& item, const Block& block, float* sums) {
    const int64_t count = block.last - block.first, rows = product_rows(block);
    if (count == 0) {
      for (int64_t i = 0; i < block.size(); ++i) write_dq(item, block, i, 0.0f);
      return;
    }
    load(item, block);
    keys_.by_columns(queries_.data(), queries_.stride(), rows, block.first, block.last,
                     scores_.data(), stride_);
    values_.by_columns(grads_.data(), grads_.stride(), rows, block.first, block.last,
                       dscores_.data(), stride_);
    for (int64_t i = 0; i < rows; ++i) {
      if (i < block.size() && !dead_[i]) {
        soften(args_, item, row_of(args_, item, block, i), part_, block.first, count,
               scores_.data() + i * stride_, dscores_.data() + i * stride_,
               tanh_.data() + i * stride_, kept_.data());
      } else {
        std::fill_n(scores_.data() + i * stride_, count, 0.0f);
        std::fill_n(dscores_.data() + i * stride_, count, 0.0f);
      }
    }
    if constexpr (kPerWord<T> == 2) {
      for (int64_t i = 0; i < rows; i += 2) {
        const float *p = scores_.data() + i * stride_, *ds = dscores_.data() + i * stride_;
        T* const ds_rows = reinterpret_cast<T*>(ds_rows_.data()) + i * stride_;
        round_two(p, p + stride_, count, p_words_.data() + i / 2 * stride_, nullptr, 0);
        round_two(ds, ds + stride_, count, ds_words_.data() + i / 2 * stride_, ds_rows, stride_);
      }
    }
    const bool half = kPerWord<T> == 2;
    const T* const ds = reinterpret_cast<const T*>(half ? ds_rows_.data() : dscores_.data());
    keys_.by_rows(ds, stride_, rows, block.first, block.last, dq_.data(), args_.head_dim, false);
    for (int64_t i = 0; i < block.size(); ++i) {
      write_dq(item, block, i, dead_[i] ? 0.0f : args_.scale);
    }
    add_keys(queries_t_.data(), args_.head_dim, half ? ds_words_.data() : dscores_.data(), rows,
             block, sums);
    add_keys(grads_t_.data(), args_.value_dim, half ? p_words_.data() : scores_.data(), rows, block,
             sums + room_ * filled(args_.head_dim));
  }

  void load(const Item& item, const Block& block) {
    queries_.load(args_.q, item, block);
    grads_.load(args_.grad, item, block);
    for (int64_t i = 0; i < block.size(); ++i) {
      const Row row = row_of(args_, item, block, i);
      dead_[i] = is_dead(args_, item, row);
      if (dead_[i]) std::fill_n(grads_.row(i), args_.value_dim, T(0));
    }
    queries_.transposed(staged_.data(), queries_t_.data());
    grads_.transposed(staged_.data(), grads_t_.data());
  }

  // sums [tile][width][keys of the tile] += a [width][kRows] times rows of keys.
  void add_keys(const float* a, int64_t width, const float* b, int64_t rows, const Block& block,
                float* sums) {
    const int64_t per_tile = std::min(room_, kAttentionKeys);
    by_tiles(block.first, block.last, [&](int64_t first, int64_t last) {
      multiply(width, last - first, filled(rows, kPerWord<T>), reinterpret_cast<const T*>(a), kRows,
               b + first - block.first, stride_, sums + tile_of(first, width), per_tile, true);
    });
  }

  // The floats of the sums, in whole tiles, that belong to keys that are seen: f(first, count).
  template <typename F>
  void by_sums(const Seen& seen, const F& f) const {
    const int64_t first = seen.first / kAttentionKeys * kAttentionKeys;
    const int64_t last = std::min(filled(seen.last, kAttentionKeys), room_);
    if (seen.first >= seen.last) return;
    const int64_t d = filled(args_.head_dim), dv = filled(args_.value_dim);
    f(first * d, (last - first) * d);
    f(room_ * d + first * dv, (last - first) * dv);
  }

  static int64_t tile_of(int64_t key, int64_t width) {
    return key / kAttentionKeys * kAttentionKeys * filled(width) + key % kAttentionKeys;
  }

  void write_dq(const Item& item, const Block& block, int64_t i, float factor) {
    const Row row = row_of(args_, item, block, i);
    T* const to = rows_of<T>(args_.dq, item, item.q_row + row.row, row.head);
    if (factor == 0.0f) return std::fill_n(to, args_.head_dim, T(0)), void();
    write_row(dq_.data() + i * args_.head_dim, factor, args_.head_dim, to);
  }

  void finish(const Item& item, int64_t head, const float* sums) {
    write_keys(args_.dk, item, head, args_.head_dim, args_.scale, sums);
    write_keys(args_.dv, item, head, args_.value_dim, args_.kept_scale,
               sums + room_ * filled(args_.head_dim));
  }

  void write_keys(const Matrices& of, const Item& item, int64_t head, int64_t width, float factor,
                  const float* sums) {
    T* const to = rows_of<T>(of, item, item.k_row, head);
    const int64_t per_tile = std::min(room_, kAttentionKeys), wide = filled(width);
    for (int64_t j = 0; j < item.length; j += kTile) {
      for (int64_t d = 0; d < wide; d += kTile) {
        at::vec::transpose_mxn<float, kTile, kTile>(sums + tile_of(j, width) + d * per_tile,
                                                    per_tile, staged_.data() + d, wide);
      }
      for (int64_t r = 0; r < std::min(kTile, item.length - j); ++r) {
        write_row(staged_.data() + r * wide, factor, width, to + (j + r) * of.row);
      }
    }
    for (int64_t j = item.length; j < item.sk; ++j) std::fill_n(to + j * of.row, width, T(0));
  }

  const AttentionBackward& args_;
  int64_t room_, stride_, part_ = 0;
  Keys<T> keys_, values_;
  Queries<T> queries_, grads_;
  Floats queries_t_, grads_t_, staged_;
  Floats scores_, dscores_, tanh_, kept_, p_words_, ds_words_, ds_rows_, dq_, sums_;
  bool dead_[kRows];
};

template <typename T>
void backward(const AttentionBackward& args) {
  if (is_short<T>(args)) return backward_short<T>(args);
  if (are_few(args, kFewBackward<T>)) return backward_few<T>(args);
  const int64_t items = args.share_items ? 1 : args.num_items;
  const int64_t heads = args.share_heads ? 1 : args.heads;
  struct Parts : Backward<T> {
    using Backward<T>::Backward;
    void run(int64_t pair) { this->add_parts(pair); }
  };
  run_tasks<T>(items * heads * args.parts, [&] { return Backward<T>(args); });
  if (args.partial != nullptr) {
    run_tasks<T>(args.num_items * args.heads, [&] { return Parts(args); });
  }
}

}  // namespace

void attention_forward(const Attention& args) {
  if (args.dtype == Float::bf16) return forward<c10::BFloat16>(args);
  forward<float>(args);
}

void attention_backward(const AttentionBackward& args) {
  if (args.dtype == Float::bf16) return backward<c10::BFloat16>(args);
  backward<float>(args);
}

}  // namespace tilewise::CPU_CAPABILITY
