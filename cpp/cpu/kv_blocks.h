// K and V of a call in blocks of 16 keys, in float32, bfloat16 or int8, as the products of block_products.h read them.
//
// Block i of a (batch, kv head) holds the keys order[16 i .. 16 i + 16), or 16 i .. 16 i + 16 where there is no order.
// Places without a key (order -1, or past the last key) hold zeros: their scores are 0 and must be masked. All sizes are
// counted in 32-bit elements, of which every row takes whole cache lines.
//
//     precision | key block                                                       | value block
//     fp32      | (16, head_size)                                                 | (16, v_head_size)
//     bf16      | (16, head_size / 2) pairs of neighbours along the head          | (8, v_head_size) pairs of keys 2 i, 2 i
//     + 1 int8      | (16, head_size / 4) quadruples, 16 scales, 16 times -128 * sum  | as bf16
//
// For tiles (tiles.h) values of bf16 are transposed: row x of a block holds its 8 pairs, beside those of its neighbour, so
// that blocks 2 i and 2 i + 1 share lines of the cache.
//
// In low precision keys are k - mean with one mean per head, which changes all scores of a query alike: what the keys have
// in common would only be rounded. int8 keys are round((k - mean) / scale) with scale = max|k - mean| / 127 of each key.
#pragma once

#include <cstddef>

#include "qexport/quantum_attention.h"

namespace qexport {

constexpr int64_t kBlockKeys = 16;

struct KvBlocks {
  Precision precision;  // fp32, bf16 or int8
  bool tiles;           // values are laid out for tiles
  int64_t count;        // blocks of each (batch, kv head)
  int64_t stored;       // those that memory is kept for: of tiles an even number
  int64_t head_size, v_head_size;
  int64_t key_row, key_block, value_row, value_block, mean_row;  // elements
  // Of the heads from first_head on; head = batch * kv_heads + kv_head.
  int64_t first_head;
  float* keys;           // (heads, stored, key_block)
  float* values;         // (heads, stored, value_block)
  float* key_mean;       // (heads, mean_row) float32, in low precision only
  const int32_t* order;  // (heads, 16 count), or null

  float* head_keys(int64_t head) const { return keys + (head - first_head) * stored * key_block; }
  float* head_values(int64_t head) const { return values + (head - first_head) * stored * value_block; }
  float* head_mean(int64_t head) const { return key_mean + (head - first_head) * mean_row; }
  const int32_t* head_order(int64_t head) const {
    return order ? order + (head - first_head) * count * kBlockKeys : nullptr;
  }
  // The first element of the values of block i, from head_values on.
  int64_t value_start(int64_t i) const {
    return tiles ? i / 2 * 2 * value_block + i % 2 * (kBlockKeys / 2) : i * value_block;
  }
  size_t bytes_per_head() const {
    return static_cast<size_t>(stored * (key_block + value_block) + mean_row) * sizeof(float);
  }
};

// The layout of `keys` keys per head, by kernels that have tiles or not; the pointers are left null.
inline KvBlocks block_layout(Precision precision, bool tiles, int64_t keys, int64_t head_size, int64_t v_head_size) {
  const auto lines = [](int64_t n) { return (n + 15) / 16 * 16; };
  KvBlocks blocks{};
  blocks.precision = precision;
  blocks.tiles = tiles && precision == Precision::bf16;
  blocks.count = (keys + kBlockKeys - 1) / kBlockKeys;
  blocks.stored = blocks.tiles ? (blocks.count + 1) / 2 * 2 : blocks.count;
  blocks.head_size = head_size;
  blocks.v_head_size = v_head_size;
  const int64_t per_element = precision == Precision::fp32 ? 1 : precision == Precision::bf16 ? 2 : 4;
  blocks.key_row = lines((head_size + per_element - 1) / per_element);
  blocks.key_block = kBlockKeys * blocks.key_row + (precision == Precision::int8 ? 2 * kBlockKeys : 0);
  blocks.value_row = blocks.tiles ? kBlockKeys : lines(v_head_size);
  blocks.value_block = (precision == Precision::fp32 ? kBlockKeys : kBlockKeys / 2) * lines(v_head_size);
  blocks.mean_row = precision == Precision::fp32 ? 0 : lines(head_size);
  return blocks;
}

}  // namespace qexport
