// Reading and writing rows of any float type, and what one block of query rows may attend to.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kMaxRows = 64;  // rows of a block: enough to hide the loads of K and V behind the arithmetic

constexpr int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : type == DType::boolean ? 1 : 2; }
static QEXPORT_INLINE int64_t element_size(DType type) { return bytes_of(type); }

// Elements src[0 .. n) as float32, n <= kLanes; the other lanes are 0.
static QEXPORT_INLINE vf load_part(DType type, const char* src, int64_t n) {
  if (type == DType::f32) {
    if (n == kLanes) return load<vf>(src);
    vf x{};
    __builtin_memcpy(&x, src, static_cast<size_t>(n) * 4);
    return x;
  }
  vh x{};
  if (n == kLanes) {
    x = load<vh>(src);
  } else {
    __builtin_memcpy(&x, src, static_cast<size_t>(n) * 2);
  }
  return type == DType::f16 ? from_f16(x) : from_bf16(x);
}

// The first n lanes in the type of `dst`.
static QEXPORT_INLINE void store_part(DType type, char* dst, vf x, int64_t n) {
  if (type == DType::f32) {
    if (n == kLanes) return store(dst, x);
    __builtin_memcpy(dst, &x, static_cast<size_t>(n) * 4);
    return;
  }
  const vh h = type == DType::f16 ? to_f16(x) : to_bf16(x);
  if (n == kLanes) return store(dst, h);
  __builtin_memcpy(dst, &h, static_cast<size_t>(n) * 2);
}

// `n` elements of `src` as float32. `dst` holds n rounded up to kLanes.
static void read_row(DType type, const char* src, int64_t n, float* dst) {
  const int64_t step = kLanes * element_size(type);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, src += step) store(dst + i, load_part(type, src, kLanes));
  if (i < n) store(dst + i, load_part(type, src, n - i));
}

// `n` float32 elements (readable up to n rounded up to kLanes) in the type of `dst`.
static void write_row(DType type, const float* src, int64_t n, char* dst) {
  const int64_t step = kLanes * element_size(type);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, dst += step) store_part(type, dst, load<vf>(src + i), kLanes);
  if (i < n) store_part(type, dst, load<vf>(src + i), n - i);
}

static QEXPORT_INLINE const char* row_of(const HeadRows& rows, DType type, int64_t b, int64_t h, int64_t i) {
  return static_cast<const char*>(rows.data) +
         (b * rows.batch_stride + h * rows.head_stride + i * rows.row_stride) * element_size(type);
}

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

// The same rows as float32. Those that are and follow one another are used where they lie. Others are brought together in
// `buffer` (count x packed_row(size) floats): half types, and rows a head apart, whose power-of-two distance would put them
// all into the same few cache sets.
static KeyRows key_rows(const AttentionJob& job, bool values, int64_t b, int64_t kv_head, int64_t j, int64_t count,
                        float* buffer) {
  const int64_t size = values ? job.params.v_head_size : job.params.head_size;
  const KeyRun run = key_run(job, values, b, kv_head, j, count);
  const bool packed = values ? job.packed_value : job.packed_key;
  if (packed || (run.type == DType::f32 && (run.step == size * 4 || run.count == 1))) {
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
  const int64_t valid = nonpad ? lesser(greater<int64_t>(nonpad[block.batch], 0), job.total_len) : job.total_len;
  const int64_t offset = nonpad ? nonpad[block.batch] - p.q_len : p.past_len;
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

// Carves arrays out of scratch, each aligned to a cache line. With base null it only counts.
struct Arena {
  char* base;
  size_t used;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return base ? p : nullptr;
  }
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
