// From attributes and tensors, as a framework hands them over, to checked params of the MPS ops. Shared by the adapters.
#pragma once

#include <string>
#include <vector>

#include "qexport/mps_decode.h"
#include "qexport/mps_encode.h"
#include "qexport/tensor_view.h"

namespace qexport {

struct MpsEncodeAttributes {
  std::vector<int64_t> row_factors, col_factors;
  int64_t bond_dim;
  double tol;
};

struct MpsEncodeCall {
  MpsEncodeParams params;  // points into the attributes and `bonds`
  std::vector<int64_t> bonds;
  Shape cores, ranks, error;
};

struct MpsDecodeAttributes {
  int64_t rows, cols;
  std::vector<int64_t> row_factors, col_factors, bonds;
};

struct MpsDecodeCall {
  MpsDecodeParams params;  // points into the attributes
  Shape matrix;
};

// Numbers in all cores together.
int64_t mps_numbers(const MpsLayout& layout);
// min(bond_dim, product of the factors to the left, product of those to the right) of each cut.
std::vector<int64_t> mps_bonds(const std::vector<int64_t>& row_factors, const std::vector<int64_t>& col_factors,
                               int64_t bond_dim);

// Errors, all std::invalid_argument with one line: "[MPSEncode] bond_dim must be >= 1, got 0".
void check_attributes(const MpsEncodeAttributes& attributes);
MpsEncodeCall resolve_call(const MpsEncodeAttributes& attributes, const TensorView& matrix);
void check_attributes(const MpsDecodeAttributes& attributes);
MpsDecodeCall resolve_call(const MpsDecodeAttributes& attributes, const TensorView& cores);
// Throws where the status is not `done`: std::invalid_argument for the matrix, std::runtime_error where nothing converged.
void check_status(const char* op_name, const MpsStatus& status);

}  // namespace qexport
