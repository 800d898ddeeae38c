// From attributes and tensors, as a framework hands them over, to checked params of the MPS ops. Shared by the adapters.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "qexport/mpo_linear.h"
#include "qexport/mps_attention.h"
#include "qexport/mps_cost.h"
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

struct MpsTrainAttributes {
  int64_t rows, cols;
  std::vector<int64_t> row_factors, col_factors, bonds;
};

struct MpsDecodeCall {
  MpsDecodeParams params;  // points into the attributes
  Shape matrix;
};

struct MpsProductAttributes {
  MpsTrainAttributes train;
  std::string method;  // auto, factored or dense
};

struct MpsAttentionCall {
  MpsPlan plan;
  MpsAttentionParams params;  // points into the attributes and the plan
  Shape Y;
};

struct MpoLinearCall {
  MpsPlan plan;
  MpoLinearParams params;  // likewise
  Shape y;
};

MpsLayout mps_layout(const MpsTrainAttributes& attributes);  // points into them
// Numbers in all cores together.
int64_t mps_numbers(const MpsLayout& layout);
// min(bond_dim, product of the factors to the left, product of those to the right) of each cut.
std::vector<int64_t> mps_bonds(const std::vector<int64_t>& row_factors, const std::vector<int64_t>& col_factors,
                               int64_t bond_dim);

// Errors, all std::invalid_argument with one line: "[MPSEncode] bond_dim must be >= 1, got 0".
void check_attributes(const MpsEncodeAttributes& attributes);
MpsEncodeCall resolve_call(const MpsEncodeAttributes& attributes, const TensorView& matrix);
void check_attributes(const char* op_name, const MpsTrainAttributes& attributes);
MpsDecodeCall resolve_call(const MpsTrainAttributes& attributes, const TensorView& cores);
void check_attributes(const char* op_name, const MpsProductAttributes& attributes);
MpsMethod mps_method(const MpsProductAttributes& attributes);
MpsAttentionCall resolve_attention(const MpsProductAttributes& attributes, const TensorView& cores, const TensorView& V);
// With `constant` the groups are those for any number of tokens of the same token_class.
MpoLinearCall resolve_linear(const MpsProductAttributes& attributes, const TensorView& x, const TensorView& cores,
                             const TensorView& bias, bool constant);
// 1 to 7 tokens are classes of their own: a product is as fast with 8 rows as with fewer.
int64_t token_class(int64_t tokens);
// What mpo_linear_cpu_prepare makes of the cores, with its memory. Throws std::bad_alloc.
class MpoLinearWeights {
 public:
  MpoLinearWeights(const MpoLinearParams& params, const void* cores, const ParallelFor& parallel);
  void* data() const;

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
};

// Throws where the status is not `done`: std::invalid_argument for the matrix, std::runtime_error where nothing converged.
void check_status(const char* op_name, const MpsStatus& status);

}  // namespace qexport
