// Attention, forward and backward, on the CPU: what the kernels are given.
//
// Legend: an item is one sequence of a batch, or of a packed tensor: Sq queries, Sk keys of which
// `length` are real. Hq = group * Hkv query heads; D numbers a query or key, Dv a value. The
// numbers of a row lie together; strides are in elements. Masks, bounds and dropout as in
// attention.py.
#pragma once

#include <cstdint>

#include "capability.h"
#include "floats.h"

namespace tilewise {

struct Item {
  int64_t batch, q_row, k_row;  // where its rows begin in q, out, lse and in k, v
  int64_t sq, sk, length;
  int64_t seed, number;  // of dropout; number of the first row of head 0
};

// [batch, heads, rows, width]
struct Matrices {
  void* data;
  int64_t batch, head, row;
};

enum class Added { none, boolean, f32, bf16, f16 };

// Added to the scores, or hiding them: [batch, heads, Sq, Sk], broadcast dims with stride 0.
struct Term {
  const void* data;
  Added kind;
  int64_t batch, head, row, key;
};

struct Attention {
  Float dtype;  // of q, k, v, out and their gradients: f32 or bf16
  const Item* items;
  int64_t num_items, heads, group, head_dim, value_dim;  // heads: of k
  Matrices q, k, v, out;
  Matrices lse;  // float, width 1
  Term mask, bias;
  const float* slopes;  // [Hq] or null
  int64_t left, right;  // -1: unbounded
  float softcap, scale;  // softcap 0: none
  bool dropout;
  uint32_t threshold;
  float kept_scale;  // 1 / (1 - p); 1 without dropout
};

struct AttentionBackward : Attention {
  Matrices grad, dq, dk, dv;
  // Gradient of bias in float: [batch, heads, parts, keys] if it is broadcast over queries, which
  // the caller sums; else of bias's shape, zero where this call begins. Null: not wanted.
  float* dbias;
  int64_t dbias_batch, dbias_head, dbias_part, dbias_row, dbias_key;
  // Items, and heads, that add to the same rows of dbias: one thread takes them, in order.
  bool share_items, share_heads;
  int64_t parts;   // in which the queries of a key head are cut, each with sums of its own
  float* partial;  // [items, heads, parts] of key_sums(); null where parts is 1
  int64_t longest;  // the largest length of an item
};

constexpr int64_t kAttentionKeys = 512;  // of a tile of scores

// How many keys there is room for; above a tile whole tiles.
inline int64_t room_for_keys(int64_t length) {
  const int64_t unit = length > kAttentionKeys ? kAttentionKeys : 16;
  return (length + unit - 1) / unit * unit;
}

// Floats of the sums that become dk and dv of one head.
inline int64_t key_sums(const Attention& args, int64_t length) {
  const auto wide = [](int64_t width) { return (width + 15) / 16 * 16; };
  return room_for_keys(length) * (wide(args.head_dim) + wide(args.value_dim));
}

TILEWISE_PER_CAPABILITY(
  void attention_forward(const Attention& args);
  void attention_backward(const AttentionBackward& args);
)

}  // namespace tilewise
