// The rows of K and V, from the past or new, wherever they lie.
#pragma once

#include "rows.h"

namespace qexport {
namespace QEXPORT_ISA {

// Where the keys of one (batch, kv head) lie.
struct KeySource {
  const AttentionJob& job;
  int64_t batch, kv_head;
  int64_t valid;  // keys from here on are padding, whatever is stored there

  KeySource(const AttentionJob& job_, int64_t b, int64_t h) : job(job_), batch(b), kv_head(h), valid(job_.total_len) {
    if (job.tensors.nonpad_kv_seqlen) valid = lesser(given_len(job, b), valid);
  }

  // Row of the key, or null where there is none.
  const char* row(bool values, int64_t key) const {
    if (key < 0 || key >= valid) return nullptr;
    const int64_t past = job.params.past_len;
    const QuantumAttentionTensors& t = job.tensors;
    if (key < past) return row_of(values ? t.past_value : t.past_key, job.params.type, batch, kv_head, key);
    return row_of(values ? t.v : t.k, job.params.type, batch, kv_head, key - past);
  }
};

static QEXPORT_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; row && at < bytes; at += 64) __builtin_prefetch(row + at);
}

// Elements x .. x + kLanes of a row of `size` elements, zero where there are none. kPlain: the row is float32, there, and
// a multiple of 16 long.
template <bool kPlain = false>
static QEXPORT_INLINE vf row_part(DType type, const char* row, int64_t size, int64_t x) {
  if (kPlain) return load<vf>(row + x * 4);
  if (!row || x >= size) return vf{};
  return load_part(type, row + x * element_size(type), lesser<int64_t>(kLanes, size - x));
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
