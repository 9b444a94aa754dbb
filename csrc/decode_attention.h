// Attention of each row's newest queries to its cached positions: what the CPU kernel is given.
//
// Legend: R rows, Hkv key heads, Hq = group * Hkv query heads, Sq queries of D numbers each; a row
// has lengths[r] of at most `capacity` positions. Strides are in elements; the D numbers of a
// query, key or value lie together.
#pragma once

#include <cstdint>

#include "capability.h"
#include "softmax.h"

namespace tilewise {

// How position t of row r is found in the caches [C, Hkv, T, D]. own: row r at t; beam: row
// table[r, t] at t; page: row table[r, t / page_size] at t % page_size.
enum class Lookup { own, beam, page };

constexpr int64_t kMaxShared = 64;  // queries that share a key: group * Sq

struct Strides {
  int64_t row, head, position;
};

struct DecodeAttention {
  const void* q;  // [R, Hq, Sq, D]
  const void* k;
  const void* v;
  void* out;  // [R, Hq, Sq, D], contiguous
  Float dtype;
  int64_t rows, kv_heads, group, queries, head_dim;
  Strides q_stride, k_stride, v_stride;
  const int64_t* lengths;  // [R], and the longest of them
  int64_t longest;
  Lookup lookup;
  const int64_t* table;  // [R, table_width], within the caches
  int64_t table_width, page_size;
  int64_t left;               // how many positions back a query sees; -1: all
  const float* alibi_slopes;  // [Hq] or null
  const float* bias;          // [R, Hq, Sq, capacity] at bias_stride, or null
  int64_t bias_stride[4];
  float scale;
};

TILEWISE_PER_CAPABILITY(
  void decode_attention(const DecodeAttention& args);
)

}  // namespace tilewise
