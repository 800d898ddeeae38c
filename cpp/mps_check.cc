#include "qexport/mps_check.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "qexport/probability_rows.h"

namespace qexport {
namespace {

constexpr int64_t kMostNumbers = int64_t{1} << 40;  // of a padded matrix: products below it cannot overflow

[[noreturn]] void fail(const char* op, const std::string& message) {
  throw std::invalid_argument("[" + std::string(op) + "] " + message);
}

std::string text(int64_t value) { return std::to_string(value); }

// The product of factors that are >= 1 and whose product is below the limit.
int64_t product(const char* op, const char* name, const std::vector<int64_t>& factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (factor < 1) fail(op, std::string(name) + " must be >= 1, got " + text(factor));
    if (factor > kMostNumbers / result) fail(op, std::string(name) + " must have a product <= 2^40");
    result *= factor;
  }
  return result;
}

void check_factors(const char* op, const std::vector<int64_t>& row_factors, const std::vector<int64_t>& col_factors) {
  if (row_factors.empty() || row_factors.size() != col_factors.size()) {
    fail(op, "row_factors and col_factors must be of one length >= 1, got " +
                 text(static_cast<int64_t>(row_factors.size())) + " and " + text(static_cast<int64_t>(col_factors.size())));
  }
  const int64_t rows = product(op, "row_factors", row_factors), cols = product(op, "col_factors", col_factors);
  if (rows > kMostNumbers / cols) fail(op, "row_factors and col_factors must have products of at most 2^40 places");
}

void check_size(const char* op, const char* name, const char* factors_name, int64_t size, int64_t most) {
  if (size >= 1 && size <= most) return;
  fail(op,
       std::string(name) + " must be in 1 to " + text(most) + ", the product of " + factors_name + ", got " + text(size));
}

void check_type(const char* op, const char* name, const TensorView& tensor, int least) {
  if (tensor.type != DType::f32 && tensor.type != DType::f64) fail(op, std::string(name) + " must be float32 or float64");
  if (tensor.shape.rank < least) {
    fail(op, std::string(name) + " must have " + text(least) + " to 4 dimensions, got " + text(tensor.shape.rank));
  }
}

int64_t leading(const Shape& shape, int axes) {
  int64_t batch = 1;
  for (int axis = 0; axis < axes; ++axis) batch *= shape.dim[axis];
  return batch;
}

}  // namespace

int64_t mps_numbers(const MpsLayout& layout) {
  int64_t numbers = 0;
  for (int64_t k = 0; k < layout.sites; ++k) {
    numbers += layout.bonds[k] * layout.row_factors[k] * layout.col_factors[k] * layout.bonds[k + 1];
  }
  return numbers;
}

std::vector<int64_t> mps_bonds(const std::vector<int64_t>& row_factors, const std::vector<int64_t>& col_factors,
                               int64_t bond_dim) {
  const size_t sites = row_factors.size();
  std::vector<int64_t> bonds(sites + 1, bond_dim);
  bonds[0] = bonds[sites] = 1;
  for (size_t k = 1; k < sites; ++k) bonds[k] = std::min(bonds[k], bonds[k - 1] * row_factors[k - 1] * col_factors[k - 1]);
  for (size_t k = sites; k-- > 1;) bonds[k] = std::min(bonds[k], bonds[k + 1] * row_factors[k] * col_factors[k]);
  return bonds;
}

void check_attributes(const MpsEncodeAttributes& a) {
  constexpr const char* op = "MPSEncode";
  check_factors(op, a.row_factors, a.col_factors);
  if (a.bond_dim < 1) fail(op, "bond_dim must be >= 1, got " + text(a.bond_dim));
  if (a.bond_dim > (1 << 20)) fail(op, "bond_dim must be <= 1048576, got " + text(a.bond_dim));
  if (!(a.tol >= 0.0 && a.tol < 1.0)) fail(op, "tol must be in [0, 1), got " + to_text(a.tol));
}

MpsEncodeCall resolve_call(const MpsEncodeAttributes& a, const TensorView& matrix) {
  constexpr const char* op = "MPSEncode";
  check_type(op, "matrix", matrix, 2);
  const Shape& shape = matrix.shape;
  const int axes = shape.rank - 2;
  const int64_t rows = shape.dim[axes], cols = shape.dim[axes + 1];
  check_size(op, "rows of matrix", "row_factors", rows, product(op, "row_factors", a.row_factors));
  check_size(op, "columns of matrix", "col_factors", cols, product(op, "col_factors", a.col_factors));
  MpsEncodeCall call{};
  call.bonds = mps_bonds(a.row_factors, a.col_factors, a.bond_dim);
  const int64_t sites = static_cast<int64_t>(a.row_factors.size());
  const MpsLayout layout{rows, cols, sites, a.row_factors.data(), a.col_factors.data(), call.bonds.data()};
  call.params = {matrix.type, leading(shape, axes), layout, a.tol};
  call.cores = call.ranks = call.error = shape;
  call.cores.rank = call.ranks.rank = axes + 1;
  call.cores.dim[axes] = mps_numbers(layout);
  call.ranks.dim[axes] = sites + 1;
  call.error.rank = axes;
  return call;
}

void check_attributes(const MpsDecodeAttributes& a) {
  constexpr const char* op = "MPSDecode";
  check_factors(op, a.row_factors, a.col_factors);
  check_size(op, "rows", "row_factors", a.rows, product(op, "row_factors", a.row_factors));
  check_size(op, "cols", "col_factors", a.cols, product(op, "col_factors", a.col_factors));
  const std::string sites = text(static_cast<int64_t>(a.row_factors.size()) + 1);
  if (a.bonds.size() != a.row_factors.size() + 1 || a.bonds.front() != 1 || a.bonds.back() != 1) {
    fail(op, "bonds must be " + sites + " numbers with a 1 at each end");
  }
  for (const int64_t bond : a.bonds) {
    if (bond < 1 || bond > (1 << 20)) fail(op, "bonds must be in 1 to 1048576, got " + text(bond));
  }
}

MpsDecodeCall resolve_call(const MpsDecodeAttributes& a, const TensorView& cores) {
  constexpr const char* op = "MPSDecode";
  check_type(op, "cores", cores, 1);
  if (cores.shape.rank > 3) fail(op, "cores must have 1 to 3 dimensions, got 4");
  const int axes = cores.shape.rank - 1;
  const int64_t sites = static_cast<int64_t>(a.row_factors.size());
  const MpsLayout layout{a.rows, a.cols, sites, a.row_factors.data(), a.col_factors.data(), a.bonds.data()};
  const int64_t numbers = mps_numbers(layout);
  if (cores.shape.dim[axes] != numbers) {
    fail(op, "cores must hold " + text(numbers) + " numbers on the last axis, got shape " + to_string(cores.shape));
  }
  MpsDecodeCall call{{cores.type, leading(cores.shape, axes), layout}, cores.shape};
  call.matrix.rank = axes + 2;
  call.matrix.dim[axes] = a.rows;
  call.matrix.dim[axes + 1] = a.cols;
  return call;
}

void check_status(const char* op, const MpsStatus& status) {
  if (status.kind == MpsStatus::no_memory) throw std::bad_alloc();
  if (status.kind == MpsStatus::not_finite) {
    fail(op, "matrix must be finite, got NaN or infinity in matrix " + text(status.matrix));
  }
  if (status.kind == MpsStatus::out_of_range) {
    fail(op, "the norm of matrix " + text(status.matrix) +
                 " must be 0 or in 1e-140 to 1e150, whose squares float64 holds: scale the matrix");
  }
  if (status.kind == MpsStatus::no_convergence) {
    throw std::runtime_error("[" + std::string(op) + "] the eigenvalues of a cut of matrix " + text(status.matrix) +
                             " did not converge: change the factors or bond_dim");
  }
}

}  // namespace qexport
