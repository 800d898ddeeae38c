// Where single rows lie.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace qexport {
namespace QEXPORT_ISA {

static QEXPORT_INLINE const char* row_of(const HeadRows& rows, DType type, int64_t b, int64_t h, int64_t i) {
  return static_cast<const char*>(rows.data) +
         (b * rows.batch_stride + h * rows.head_stride + i * rows.row_stride) * element_size(type);
}

// nonpad_kv_seqlen of a batch item, which may be any number, as one that positions and windows can be counted from.
static QEXPORT_INLINE int64_t given_len(const AttentionJob& job, int64_t b) {
  return lesser(greater<int64_t>(job.tensors.nonpad_kv_seqlen[b], 0), int64_t{1} << 40);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
