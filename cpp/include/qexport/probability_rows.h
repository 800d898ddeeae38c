// What the ops on rows of probabilities share: their checks, and the errors that these end in, all std::invalid_argument
// with one line.
#pragma once

#include "qexport/tensor_view.h"

namespace qexport {

// `rows` contiguous rows of n probabilities each, at `data`.
struct ProbabilityRows {
  const void* data;
  DType type;
  int64_t rows, n;
};

// How far the sum of a row may be from one.
constexpr double sum_tolerance(DType type) {
  return type == DType::f64 ? 1e-9 : type == DType::f32 ? 1e-4 : type == DType::f16 ? 2e-3 : 1e-2;
}

// The rows of a tensor (..., n) of a float type. Fails where it has no axis or n < least.
ProbabilityRows probability_rows(const char* op_name, const TensorView& probabilities, int64_t least);

// Says what is wrong with the row that a kernel returned: a number that is not >= 0, or the sum.
[[noreturn]] void fail_row(const char* op_name, const ProbabilityRows& rows, int64_t row);

// `value` as printf writes it with %g.
std::string to_text(double value);

}  // namespace qexport
