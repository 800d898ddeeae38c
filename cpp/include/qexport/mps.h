// Trains of cores for a matrix (matrix product states and operators): docs/mps.md.
// Plain pointers and sizes; knows no framework.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

// Core k is (bonds[k], row_factors[k], col_factors[k], bonds[k + 1]), row-major; the cores of a matrix lie behind each
// other.
struct MpsLayout {
  int64_t rows, cols;
  int64_t sites;
  const int64_t* row_factors;  // (sites,), product >= rows
  const int64_t* col_factors;  // (sites,), product >= cols
  const int64_t* bonds;        // (sites + 1,), 1 at both ends
};

// What became of a call.
struct MpsStatus {
  enum Kind { done, not_finite, out_of_range, no_convergence, no_memory } kind;
  int64_t matrix;  // of the batch, the first that it became of
};

}  // namespace qexport
