// Exact attention of a block of rows over K and V in blocks of 16 keys: bfloat16 and int8.
#pragma once

#include "arena.h"
#include "blocked_softmax.h"
#include "scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kBlockedTile = 128;  // keys
constexpr int64_t kFirstTile = 32;     // of the first tile, which finds the maximum that the others start from

struct BlockedScratch {
  float *q_t, *q_scale, *q_mean, *s, *p, *bias, *o_t;
};

static BlockedScratch blocked_scratch(const AttentionJob& job, Arena& arena) {
  const KvBlocks& blocks = job.blocks;
  BlockedScratch s;
  s.q_t = arena.take<float>(greater(blocks.head_size, query_elements(blocks)) * kMaxRows);
  s.q_scale = arena.take<float>(kMaxRows);
  s.q_mean = arena.take<float>(kMaxRows);
  s.s = arena.take<float>(kBlockedTile * kMaxRows);
  s.p = blocks.precision == Precision::fp32 ? s.s : arena.take<float>(kBlockedTile / 2 * kMaxRows);
  s.bias = arena.take<float>(job.tensors.mask.data ? kBlockedTile * kMaxRows : 0);
  s.o_t = arena.take<float>(packed_row(blocks.v_head_size) * kMaxRows);
  return s;
}

// Adds q . key_mean, which scores in low precision lack. Softmax does not see it, softcap does.
static void add_mean_scores(const float* q_mean, float* s, int64_t ld, int64_t count) {
  for (int64_t j = 0; j < count; ++j, s += ld) {
    for (int64_t r = 0; r < ld; r += kLanes) store(s + r, load<vf>(s + r) + load<vf>(q_mean + r));
  }
}

// m = -inf, l = 0, O = 0: nothing attended to yet. O waits to be multiplied by alpha.
static void start_rows(const KvBlocks& blocks, int64_t ld, float* o_t, float* m, float* l, float* alpha) {
  for (int64_t r = 0; r < ld; ++r) m[r] = -kInf, l[r] = 0.0f, alpha[r] = 1.0f;
  for (int64_t i = 0; i < blocks.v_head_size * ld; i += kLanes) store(o_t + i, vf{});
}

// Online softmax over the keys of `blocks`, in their own order, from `begin`, a multiple of 16, to the last that a row
// attends to.
static void blocked_range(const AttentionJob& job, const KvBlocks& blocks, int64_t head, const Rows& rows,
                          const BlockedScratch& scratch, int64_t begin, float* m, float* l, float* alpha) {
  const AttentionMask& mask = job.tensors.mask;
  const float *keys = blocks.head_keys(head), *values = blocks.head_values(head);
  const float softcap = job.params.softcap * kLog2E;
  const int64_t ld = rows.vecs * kLanes;
  alignas(64) float next_alpha[kMaxRows];
  bool moved = false;
  for (int64_t j = begin, count; j < rows.end; j += count) {
    const int64_t most = j == begin ? kFirstTile : kBlockedTile;
    int32_t list[kBlockedTile / kBlockKeys];
    int64_t listed = 0;
    for (count = 0; count < most && j + count < rows.end; count += kBlockKeys) {
      list[listed++] = static_cast<int32_t>((j + count) / kBlockKeys);
    }
    const MaskEffect effect = mask.data ? mask_bias(mask, rows, j, count, scratch.bias, ld) : MaskEffect::none;
    if (effect == MaskEffect::all_masked) continue;
    bool later = false;  // m has moved, but not for this tile
    const bool plain = softcap == 0.0f && effect == MaskEffect::none && !ranged(rows, j, count);
    if (!plain || !exp2_score_blocks(blocks, keys, list, listed, scratch.q_t, scratch.q_scale, ld, rows.vecs, m, l,
                                     next_alpha, scratch.p, later)) {
      score_blocks(blocks, keys, list, listed, scratch.q_t, scratch.q_scale, scratch.s, ld, rows.vecs);
      if (softcap > 0.0f) {
        if (blocks.mean_row > 0) add_mean_scores(scratch.q_mean, scratch.s, ld, count);
        apply_softcap(scratch.s, count * ld, softcap);
      }
      apply_mask(rows, j, count, effect == MaskEffect::some ? scratch.bias : nullptr, scratch.s, ld, kLog2E);
      moved = exp2_scores(blocks.precision, scratch.s, ld, count, rows.vecs, m, l, alpha, scratch.p);
    }
    value_blocks(blocks, values, list, listed, scratch.p, scratch.o_t, ld, rows.vecs, moved ? alpha : nullptr);
    moved = later;
    for (int64_t r = 0; r < ld; r += kLanes) store(alpha + r, later ? load<vf>(next_alpha + r) : vf{} + 1.0f);
  }
}

// A row without an allowed key is 0; its m is -inf, and so is that of a row whose scores are all NaN, which stays NaN.
static void finish_rows(const AttentionJob& job, RowBlock block, const Rows& rows, const float* o_t, const float* m,
                        float* l, const float* alpha) {
  const int64_t ld = rows.vecs * kLanes;
  for (int64_t r = 0; r < ld; ++r) l[r] = m[r] == -kInf && l[r] == l[r] ? 0.0f : alpha[r] / l[r];
  write_outputs(job, block, rows, o_t, ld, l);
}

static void blocked_exact_block(const AttentionJob& job, RowBlock block, char* memory) {
  const QuantumAttentionParams& params = job.params;
  const KvBlocks& blocks = job.blocks;
  const int64_t head = block.batch * params.kv_heads + block.kv_head;
  const TileRegisters registers;
  Rows rows;
  set_rows(job, block, rows);
  Arena arena{memory, 0};
  const BlockedScratch scratch = blocked_scratch(job, arena);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, params.scale * kLog2E, scratch.q_t, ld);
  if (blocks.mean_row > 0 && params.softcap > 0.0f) {
    score_product(blocks.head_mean(head), 0, scratch.q_t, scratch.q_mean, ld, blocks.head_size, 1, rows.vecs);
  }
  pack_block_queries(blocks, scratch.q_t, ld, rows.vecs, scratch.q_scale);
  alignas(64) float m[kMaxRows], l[kMaxRows], alpha[kMaxRows];
  start_rows(blocks, ld, scratch.o_t, m, l, alpha);
  prefetch_outputs(job, block, rows);
  blocked_range(job, blocks, head, rows, scratch, rows.begin / kBlockKeys * kBlockKeys, m, l, alpha);
  finish_rows(job, block, rows, scratch.o_t, m, l, alpha);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
