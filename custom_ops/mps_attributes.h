// Attributes of the ops on trains of cores.
#pragma once

#include "ort_api.h"
#include "qexport/mps_check.h"

namespace qexport {

inline MpsTrainAttributes train_attributes(const NodeAttributes& node) {
  return {node.integer("rows"), node.integer("cols"), node.integers("row_factors"), node.integers("col_factors"),
          node.integers("bonds")};
}

inline MpsProductAttributes product_attributes(const OrtKernelInfo* info, const char* op_name) {
  const NodeAttributes node(info, op_name);
  MpsProductAttributes attributes{train_attributes(node), node.text("method")};
  check_attributes(op_name, attributes);
  return attributes;
}

}  // namespace qexport
