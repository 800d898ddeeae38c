// Exact attention of a block of rows: online softmax over tiles of keys, never more than kTile scores per row in memory.
#pragma once

#include "few_rows.h"
#include "tile_softmax.h"

namespace qexport {
namespace QEXPORT_ISA {

// Keys. 128 measured 1 to 2 % faster than 64 at every length: O^T is read and written half as often, S^T still fits in L1.
constexpr int64_t kTile = 128;

struct ExactScratch {
  float *q_t, *s, *bias, *o_t, *keys;
};

static ExactScratch exact_scratch(const AttentionJob& job, Arena& arena) {
  const QuantumAttentionParams& p = job.params;
  const int64_t size = packed_row(greater(p.head_size, p.v_head_size));
  ExactScratch s;
  s.q_t = arena.take<float>(p.head_size * kMaxRows);
  s.s = arena.take<float>(kTile * kMaxRows);
  s.bias = arena.take<float>(job.tensors.mask.data ? kTile * kMaxRows : 0);
  s.o_t = arena.take<float>(p.v_head_size * kMaxRows);
  s.keys = arena.take<float>(kTile * size);
  return s;
}

static void exact_block(const AttentionJob& job, RowBlock block, char* memory) {
  const QuantumAttentionParams& p = job.params;
  const AttentionMask& mask = job.tensors.mask;
  Rows rows;
  set_rows(job, block, rows);
  // Its dot products end in sums over lanes: too many of them beside keys that the first cache holds anyway.
  const bool few = rows.count <= 2 || (rows.count <= kFewRows && rows.end - rows.begin > kFewestKeysOfFew);
  if (few) return few_rows_block(job, block, rows, memory);
  Arena arena{memory, 0};
  const ExactScratch scratch = exact_scratch(job, arena);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, p.scale * kLog2E, scratch.q_t, ld);

  alignas(64) float m[kMaxRows], l[kMaxRows], alpha[kMaxRows];
  for (int64_t r = 0; r < ld; ++r) m[r] = -kInf, l[r] = 0.0f, alpha[r] = 1.0f;
  for (int64_t i = 0; i < p.v_head_size * ld; i += kLanes) store(scratch.o_t + i, vf{});

  const bool memory_bound = rows.vecs == 1;  // too little arithmetic per key to hide the way to memory
  for (int64_t j = rows.begin, count; j < rows.end; j += count) {
    const KeyRows k = key_rows(job, false, block.batch, block.kv_head, j, lesser(kTile, rows.end - j), scratch.keys);
    count = k.count;
    const MaskEffect effect = mask.data ? mask_bias(mask, rows, j, count, scratch.bias, ld) : MaskEffect::none;
    if (effect == MaskEffect::all_masked) continue;
    if (memory_bound) prefetch_keys(job, true, block.batch, block.kv_head, j, count);
    score_product(k.data, k.stride, scratch.q_t, scratch.s, ld, p.head_size, count, rows.vecs);
    if (p.softcap > 0.0f) apply_softcap(scratch.s, count * ld, p.softcap * kLog2E);
    apply_mask(rows, j, count, effect == MaskEffect::some ? scratch.bias : nullptr, scratch.s, ld, kLog2E);
    const bool moved = exp2_scores(Precision::fp32, scratch.s, ld, count, rows.vecs, m, l, alpha, scratch.s);
    if (memory_bound && j + count < rows.end) prefetch_keys(job, false, block.batch, block.kv_head, j + count, kTile);
    const KeyRows v = key_rows(job, true, block.batch, block.kv_head, j, count, scratch.keys);
    value_product(v.data, v.stride, scratch.s, scratch.o_t, ld, p.v_head_size, count, rows.vecs, moved ? alpha : nullptr);
    for (int64_t r = 0; r < ld; r += kLanes) store(alpha + r, vf{} + 1.0f);
  }

  // A row without an allowed key has l = 0 and is 0.
  for (int64_t r = 0; r < ld; ++r) l[r] = l[r] == 0.0f ? 0.0f : 1.0f / l[r];
  write_outputs(job, block, rows, scratch.o_t, ld, l);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
