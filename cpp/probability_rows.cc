// Checks of rows of probabilities, outside of the kernels: all that happens once per call, or ends it.
#include "qexport/probability_rows.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cpu/elements.h"

namespace qexport {
namespace {

double element(const ProbabilityRows& rows, int64_t place) {
  const char* data = static_cast<const char*>(rows.data);
  if (rows.type == DType::f64) {
    double value;
    std::memcpy(&value, data + place * 8, 8);
    return value;
  }
  using namespace QEXPORT_ISA;
  return load_part(rows.type, data + place * bytes_of(rows.type), 1)[0];
}

}  // namespace

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (int i = 0; i < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(shape.dim[i]);
  return text + (shape.rank == 1 ? ",)" : ")");
}

ProbabilityRows probability_rows(const char* op_name, const TensorView& probabilities, int64_t least) {
  const std::string where = "[" + std::string(op_name) + "] probabilities ";
  const Shape& shape = probabilities.shape;
  if (probabilities.type == DType::boolean || probabilities.type == DType::i64) {
    throw std::invalid_argument(where + "must be float32, float16, bfloat16 or float64");
  }
  if (shape.rank < 1) throw std::invalid_argument(where + "must have 1 to 4 dimensions, got 0");
  const int64_t n = shape.dim[shape.rank - 1];
  if (n < least) {
    throw std::invalid_argument(where + "must have rows of >= " + std::to_string(least) + " numbers, got rows of " +
                                std::to_string(n));
  }
  int64_t rows = 1;
  for (int axis = 0; axis + 1 < shape.rank; ++axis) rows *= shape.dim[axis];
  return {probabilities.data, probabilities.type, rows, n};
}

void fail_row(const char* op_name, const ProbabilityRows& rows, int64_t row) {
  const std::string where = "[" + std::string(op_name) + "] probabilities must ", in_row = " row " + std::to_string(row);
  double sum = 0.0;
  for (int64_t j = 0; j < rows.n; ++j) {
    const double value = element(rows, row * rows.n + j);
    if (!(value >= 0.0)) {
      throw std::invalid_argument(where + "be >= 0, got " + to_text(value) + " at place " + std::to_string(j) + " of" +
                                  in_row);
    }
    sum += value;
  }
  throw std::invalid_argument(where + "sum to 1 within " + to_text(sum_tolerance(rows.type)) + "," + in_row + " is off by " +
                              to_text(sum - 1.0) + "; divide it by its sum");
}

std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace qexport
