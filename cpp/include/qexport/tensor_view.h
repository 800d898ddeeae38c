// Tensors as a framework hands them over: what the checks of the ops work on.
#pragma once

#include <string>

#include "qexport/dtype.h"

namespace qexport {

struct Shape {
  int rank;
  int64_t dim[5];
};
std::string to_string(const Shape& shape);

// One input: data null where it is absent.
struct TensorView {
  const void* data;
  bool present;
  DType type;
  Shape shape;
};

}  // namespace qexport
