// Rows of a trellis encoder: the copy of the kernels for this processor does the work.
#include "qexport/trellis.h"

#include "kernels.h"
#include "workers.h"

namespace qexport {

size_t trellis_encode_cpu_scratch_bytes(const TrellisParams& params, const ParallelFor& parallel) {
  return trellis_row_bytes(params) * static_cast<size_t>(parallel.max_threads);
}

void trellis_encode_cpu(const TrellisParams& params, const TrellisTensors& tensors, void* scratch,
                        const ParallelFor& parallel) {
  const size_t row_bytes = trellis_row_bytes(params);
  for_each_piece(params.rows, parallel.max_threads, static_cast<char*>(scratch), row_bytes, parallel,
                 [&](int64_t row, char* own) {
                   const int64_t at = row * params.columns;
                   kernels().trellis->encode_row(params, tensors.values + at, tensors.table, tensors.windows + at, own);
                 });
}

}  // namespace qexport
