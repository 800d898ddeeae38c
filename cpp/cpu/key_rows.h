// Runs of rows of K and V: where they lie, and as float32.
#pragma once

#include "rows.h"

namespace qexport {
namespace QEXPORT_ISA {

// Query rows of a kv head up to which bringing its keys together costs more than it saves: 2 of 22 us at 8 heads of 32 rows.
constexpr int64_t kOneBlock = 32;

// Up to `count` rows of K or V from key `j` on, as float32.
struct KeyRows {
  const float* data;
  int64_t stride;
  int64_t count;
};

// `count` rows, `step` bytes apart, as float32 rows of packed_row(size) floats.
static void gather_rows(DType type, const char* src, int64_t step, int64_t size, int64_t count, float* dst) {
  const int64_t stride = packed_row(size), bytes = size * element_size(type);
  for (int64_t i = 0; i < count; ++i, src += step, dst += stride) {
    // Rows far apart are beyond the reach of the hardware prefetcher.
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(src + 8 * step + line);
    read_row(type, src, size, dst);
  }
}

// Up to `count` rows of K or V from key `j` on, where they lie: `step` bytes apart. Keys before past_len come from the past,
// the others from the new rows; a run never crosses the border. Where packed_key and packed_value are filled, they are
// taken.
struct KeyRun {
  const char* data;
  int64_t step;
  int64_t count;
  DType type;
};

static KeyRun key_run(const AttentionJob& job, bool values, int64_t b, int64_t kv_head, int64_t j, int64_t count) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  if (const float* packed = values ? job.packed_value : job.packed_key) {
    const int64_t stride = packed_row(values ? p.v_head_size : p.head_size);
    return {reinterpret_cast<const char*>(packed + ((b * p.kv_heads + kv_head) * job.total_len + j) * stride), stride * 4,
            lesser(count, job.total_len - j), DType::f32};
  }
  const bool past = j < p.past_len;
  const HeadRows& rows = past ? (values ? t.past_value : t.past_key) : (values ? t.v : t.k);
  return {row_of(rows, p.type, b, kv_head, past ? j : j - p.past_len), rows.row_stride * element_size(p.type),
          lesser(count, past ? p.past_len - j : job.total_len - j), p.type};
}

// Asks for what comes kAhead bytes behind rows [first, first + n) of a run. Rows that follow one another are left to the
// hardware prefetcher, which stops at the end of a page: measured, two lines of each page ahead bring it to the speed of the
// memory, more of them slow it down. Rows far apart are beyond its reach. Inlined by force: GCC takes a function that only
// prefetches for one without effect.
static QEXPORT_INLINE void prefetch_run(const KeyRun& run, int64_t first, int64_t n, int64_t size) {
  constexpr int64_t kPage = 4096, kAhead = 16 * kPage;
  const char* row = run.data + first * run.step;
  if (run.step < 2 * size * element_size(run.type)) {
    const char* end = row + n * run.step + kAhead;
    for (row += kAhead + (-reinterpret_cast<intptr_t>(row) & (kPage - 1)); row < end; row += kPage) {
      __builtin_prefetch(row);
      __builtin_prefetch(row + 64);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const char* ahead = row + (i + kLanes) * run.step;
    for (int64_t line = 0; line < size * element_size(run.type); line += 64) __builtin_prefetch(ahead + line);
  }
}

// The same rows as float32. Those that are and follow one another, or are read by a single block, are used where they lie.
// Others are brought together in `buffer` (count x packed_row(size) floats): half types, and rows a head apart, whose
// power-of-two distance would put them all into the same few cache sets.
static KeyRows key_rows(const AttentionJob& job, bool values, int64_t b, int64_t kv_head, int64_t j, int64_t count,
                        float* buffer) {
  const int64_t size = values ? job.params.v_head_size : job.params.head_size;
  const KeyRun run = key_run(job, values, b, kv_head, j, count);
  const bool packed = values ? job.packed_value : job.packed_key;
  if (packed ||
      (run.type == DType::f32 && (run.step == size * 4 || run.count == 1 || job.group * job.params.q_len <= kOneBlock))) {
    return {reinterpret_cast<const float*>(run.data), run.step / 4, run.count};
  }
  gather_rows(run.type, run.data, run.step, size, run.count, buffer);
  return {buffer, packed_row(size), run.count};
}

// Asks for `count` keys from key j on, ahead of their use: the register blocks read eight rows at a time, which the hardware
// prefetcher does not follow. Inlined by force: GCC takes a function that only prefetches for one without effect.
static QEXPORT_INLINE void prefetch_keys(const AttentionJob& job, bool values, int64_t b, int64_t kv_head, int64_t j,
                                         int64_t count) {
  const QuantumAttentionParams& p = job.params;
  const int64_t size = values ? p.v_head_size : p.head_size;
  const float* packed = values ? job.packed_value : job.packed_key;
  const char* src;
  int64_t bytes;
  if (packed) {
    bytes = packed_row(size) * 4;
    src = reinterpret_cast<const char*>(packed) + ((b * p.kv_heads + kv_head) * job.total_len + j) * bytes;
  } else {
    const HeadRows& rows = values ? job.tensors.v : job.tensors.k;
    bytes = size * 4;
    if (p.type != DType::f32 || rows.row_stride != size || j < p.past_len) return;
    src = row_of(rows, p.type, b, kv_head, j - p.past_len);
  }
  count = lesser(count, job.total_len - j);
  for (int64_t at = 0; at < count * bytes; at += 64) __builtin_prefetch(src + at, 0, 2);
}

// Past and new rows of one kv head, joined, in float32.
static void pack(const AttentionJob& job, int64_t b, int64_t kv_head) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  for (int which = 0; which < 2; ++which) {
    const bool values = which == 1;
    float* dst = values ? job.packed_value : job.packed_key;
    if (!dst) continue;
    const int64_t size = values ? p.v_head_size : p.head_size, stride = packed_row(size);
    dst += (b * p.kv_heads + kv_head) * job.total_len * stride;
    const HeadRows& past = values ? t.past_value : t.past_key;
    const HeadRows& fresh = values ? t.v : t.k;
    if (p.past_len > 0) {
      gather_rows(p.type, row_of(past, p.type, b, kv_head, 0), past.row_stride * element_size(p.type), size, p.past_len,
                  dst);
    }
    if (p.kv_len > 0) {
      gather_rows(p.type, row_of(fresh, p.type, b, kv_head, 0), fresh.row_stride * element_size(p.type), size, p.kv_len,
                  dst + p.past_len * stride);
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
