// The query rows of one block: what they may attend to, reading them, and writing their outputs.
#pragma once

#include "rows.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kMaxRows = 64;  // rows of a block: enough to hide the loads of K and V behind the arithmetic

// The rows of one block, one per lane, with the keys [lo, hi) that causality, windows, padding and the length of the mask
// leave to each of them. Lanes past the last row attend to nothing.
struct Rows {
  int64_t count;
  int vecs;
  int64_t head[kMaxRows], query[kMaxRows];
  const char* mask[kMaxRows];
  alignas(64) int32_t lo[kMaxRows];
  alignas(64) int32_t hi[kMaxRows];
  int64_t begin, end;                // the union of the ranges
  int64_t common_begin, common_end;  // their intersection
  bool shared_mask;                  // every row has the same mask row
};

// Whether element j of a mask row lets a row attend to key j.
static bool mask_allows(DType type, const char* row, int64_t j) {
  if (type == DType::boolean) return row[j] != 0;
  if (type == DType::f32) {
    float x;
    __builtin_memcpy(&x, row + j * 4, 4);
    return x != -kInf;
  }
  uint16_t half;
  __builtin_memcpy(&half, row + j * 2, 2);
  return half != (type == DType::f16 ? 0xFC00 : 0xFF80);
}

// `queries`, if given, are the rows of the block, all of the query head of its first row.
static void set_rows(const AttentionJob& job, const RowBlock& block, Rows& rows, const int64_t* queries = nullptr) {
  const QuantumAttentionParams& p = job.params;
  const AttentionMask& mask = job.tensors.mask;
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  const int64_t valid = nonpad ? lesser(given_len(job, block.batch), job.total_len) : job.total_len;
  const int64_t offset = nonpad ? given_len(job, block.batch) - p.q_len : p.past_len;
  rows.count = block.count;
  rows.vecs = static_cast<int>((block.count + kLanes - 1) / kLanes);
  rows.begin = job.total_len, rows.end = 0, rows.common_begin = 0, rows.common_end = job.total_len;
  rows.shared_mask = true;
  int64_t head = block.kv_head * job.group + block.first / p.q_len, query = block.first % p.q_len;
  for (int64_t r = 0; r < rows.vecs * kLanes; ++r) {
    rows.lo[r] = rows.hi[r] = 0;
    rows.mask[r] = nullptr;
    if (r >= block.count) continue;
    if (queries) query = queries[r];
    rows.head[r] = head, rows.query[r] = query;
    const int64_t position = query + offset;
    int64_t lo = 0, hi = valid;
    if (p.is_causal) hi = lesser(hi, position + 1);
    if (p.right_window >= 0) hi = lesser(hi, position + p.right_window + 1);
    if (p.left_window >= 0) lo = greater<int64_t>(lo, position - p.left_window);
    if (mask.data) {
      hi = lesser(hi, mask.len);
      rows.mask[r] =
          static_cast<const char*>(mask.data) +
          (block.batch * mask.batch_stride + head * mask.head_stride + query * mask.query_stride) * element_size(mask.type);
      rows.shared_mask = rows.shared_mask && rows.mask[r] == rows.mask[0];
    }
    lo = greater(lo, block.key_begin), hi = lesser(hi, block.key_end);
    if (hi <= lo) lo = hi = 0;
    rows.lo[r] = static_cast<int32_t>(lo), rows.hi[r] = static_cast<int32_t>(hi);
    rows.common_begin = greater(rows.common_begin, lo), rows.common_end = lesser(rows.common_end, hi);
    if (hi > lo) rows.begin = lesser(rows.begin, lo), rows.end = greater(rows.end, hi);
    if (++query == p.q_len && !queries) ++head, query = 0;
  }
  if (mask.data && rows.shared_mask) {  // padding, as a rule
    while (rows.end > rows.begin && !mask_allows(mask.type, rows.mask[0], rows.end - 1)) --rows.end;
    while (rows.begin < rows.end && !mask_allows(mask.type, rows.mask[0], rows.begin)) ++rows.begin;
  }
  if (rows.begin >= rows.end) rows.begin = rows.end = 0;
}

// q_t[x][lane] = scale * Q[lane][x], zero in lanes without a row.
static void pack_queries(const AttentionJob& job, const RowBlock& block, const Rows& rows, float scale, float* q_t,
                         int64_t ld) {
  const QuantumAttentionParams& p = job.params;
  const int64_t bytes = element_size(p.type);
  const char* src[kMaxRows];
  for (int64_t r = 0; r < rows.count; ++r) {
    src[r] = row_of(job.tensors.q, p.type, block.batch, rows.head[r], rows.query[r]);
    for (int64_t at = 0; at < p.head_size * bytes; at += 64) __builtin_prefetch(src[r] + at);
  }
  for (int64_t r0 = 0; r0 < ld; r0 += kLanes) {
    for (int64_t x = 0; x < p.head_size; x += kLanes) {
      const int64_t n = lesser<int64_t>(kLanes, p.head_size - x);
      vf m[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        m[lane] = r0 + lane < rows.count ? load_part(p.type, src[r0 + lane] + x * bytes, n) * scale : vf{};
      }
      transpose(m);
      for (int64_t i = 0; i < n; ++i) store(q_t + (x + i) * ld + r0, m[i]);
    }
  }
}

static QEXPORT_INLINE char* output_row(const AttentionJob& job, int64_t b, int64_t head, int64_t query) {
  const QuantumAttentionTensors& t = job.tensors;
  return static_cast<char*>(t.y) +
         (b * t.y_batch_stride + head * t.y_head_stride + query * t.y_row_stride) * element_size(job.params.type);
}

// Asks for the lines that write_outputs will write, which otherwise waits for every one of them.
static QEXPORT_INLINE void prefetch_outputs(const AttentionJob& job, const RowBlock& block, const Rows& rows) {
  const int64_t bytes = job.params.v_head_size * element_size(job.params.type);
  for (int64_t r = 0; r < rows.count; ++r) {
    const char* row = output_row(job, block.batch, rows.head[r], rows.query[r]);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 1);
  }
}

// Y[lane][x] = o_t[x][lane] * factor[lane], or 0 where factor is 0.
static void write_outputs(const AttentionJob& job, const RowBlock& block, const Rows& rows, const float* o_t, int64_t ld,
                          const float* factor) {
  const QuantumAttentionParams& p = job.params;
  const int64_t bytes = element_size(p.type);
  for (int64_t r0 = 0; r0 < rows.count; r0 += kLanes) {
    const int64_t live = lesser<int64_t>(kLanes, rows.count - r0);
    const vf f = load<vf>(factor + r0);
    char* dst[kLanes];
    for (int64_t lane = 0; lane < live; ++lane) {
      dst[lane] = output_row(job, block.batch, rows.head[r0 + lane], rows.query[r0 + lane]);
    }
    for (int64_t x = 0; x < p.v_head_size; x += kLanes) {
      const int64_t n = lesser<int64_t>(kLanes, p.v_head_size - x);
      vf m[kLanes];
      for (int i = 0; i < kLanes; ++i) m[i] = i < n ? load<vf>(o_t + (x + i) * ld + r0) : vf{};
      for (int i = 0; i < kLanes; ++i) m[i] = f == 0.0f ? vf{} : m[i] * f;
      transpose(m);
      for (int64_t lane = 0; lane < live; ++lane) store_part(p.type, dst[lane] + x * bytes, m[lane], n);
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
