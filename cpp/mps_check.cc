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

void check_numbers(const char* op, const MpsLayout& layout, const TensorView& cores) {
  const int64_t numbers = mps_numbers(layout);
  if (cores.shape.rank > 0 && cores.shape.dim[cores.shape.rank - 1] == numbers) return;
  fail(op, "cores must hold " + text(numbers) + " numbers on the last axis, got shape " + to_string(cores.shape));
}

void check_float(const char* op, const char* name, const TensorView& tensor, DType type) {
  const DType t = tensor.type;
  if (t != DType::f32 && t != DType::f16 && t != DType::bf16 && t != DType::f64) {
    fail(op, std::string(name) + " must be float32, float16, bfloat16 or float64");
  }
  if (t != type) fail(op, std::string(name) + " must have the type of cores");
}

}  // namespace

MpsLayout mps_layout(const MpsTrainAttributes& a) {
  const int64_t sites = static_cast<int64_t>(a.row_factors.size());
  return {a.rows, a.cols, sites, a.row_factors.data(), a.col_factors.data(), a.bonds.data()};
}

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

void check_attributes(const char* op, const MpsTrainAttributes& a) {
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
  int64_t left = kMostNumbers;  // each core is compared without its product, which may be beyond 64 bits
  for (size_t k = 0; k < a.row_factors.size(); ++k) {
    const int64_t sides = a.bonds[k] * a.bonds[k + 1], matrix = a.row_factors[k] * a.col_factors[k];
    if (sides > left / matrix) fail(op, "cores must hold at most 2^40 numbers, take smaller bonds or factors");
    left -= sides * matrix;
  }
}

MpsDecodeCall resolve_call(const MpsTrainAttributes& a, const TensorView& cores) {
  constexpr const char* op = "MPSDecode";
  check_type(op, "cores", cores, 1);
  if (cores.shape.rank > 3) fail(op, "cores must have 1 to 3 dimensions, got 4");
  const int axes = cores.shape.rank - 1;
  const MpsLayout layout = mps_layout(a);
  check_numbers(op, layout, cores);
  MpsDecodeCall call{{cores.type, leading(cores.shape, axes), layout}, cores.shape};
  call.matrix.rank = axes + 2;
  call.matrix.dim[axes] = a.rows;
  call.matrix.dim[axes + 1] = a.cols;
  return call;
}

void check_attributes(const char* op, const MpsProductAttributes& a) {
  check_attributes(op, a.train);
  if (a.method == "auto" || a.method == "factored" || a.method == "dense") return;
  fail(op, "method must be auto, factored or dense, got " + a.method);
}

MpsMethod mps_method(const MpsProductAttributes& a) {
  return a.method == "dense" ? MpsMethod::dense : a.method == "factored" ? MpsMethod::factored : MpsMethod::automatic;
}

MpsAttentionCall resolve_attention(const MpsProductAttributes& a, const TensorView& cores, const TensorView& V) {
  constexpr const char* op = "MPSAttention";
  check_float(op, "cores", cores, cores.type);
  check_float(op, "V", V, cores.type);
  const MpsLayout layout = mps_layout(a.train);
  check_numbers(op, layout, cores);
  const int axes = V.shape.rank - 2;
  if (axes < 0 || V.shape.dim[axes] != layout.cols) {
    fail(op, "V must be (..., " + text(layout.cols) + ", features), got shape " + to_string(V.shape));
  }
  const bool shared = cores.shape.rank == 1;
  if (!shared && (cores.shape.rank != axes + 1 || !std::equal(V.shape.dim, V.shape.dim + axes, cores.shape.dim))) {
    fail(op, "cores must have one axis, or the leading axes of V " + to_string(V.shape) + " before it, got shape " +
                 to_string(cores.shape));
  }
  const int64_t batch = leading(V.shape, axes), features = V.shape.dim[axes + 1];
  const int64_t trains = shared ? 1 : batch, items = shared ? batch : 1;
  MpsAttentionCall call{plan_attention(layout, items, features, mps_method(a)), {}, V.shape};
  const MpsGroups groups{static_cast<int64_t>(call.plan.ends.size()), call.plan.ends.data()};
  call.params = {cores.type, layout, groups, trains, items, features};
  call.Y.dim[axes] = layout.rows;
  return call;
}

int64_t token_class(int64_t tokens) { return std::min<int64_t>(tokens, 8); }

MpoLinearCall resolve_linear(const MpsProductAttributes& a, const TensorView& x, const TensorView& cores,
                             const TensorView& bias, bool constant) {
  constexpr const char* op = "MPOLinear";
  check_float(op, "cores", cores, cores.type);
  check_float(op, "x", x, cores.type);
  const MpsLayout layout = mps_layout(a.train);
  check_numbers(op, layout, cores);
  if (cores.shape.rank != 1) fail(op, "cores must have one axis, got shape " + to_string(cores.shape));
  const int axes = x.shape.rank - 1;
  if (axes < 0 || x.shape.dim[axes] != layout.rows) {
    fail(op, "x must be (..., " + text(layout.rows) + "), got shape " + to_string(x.shape));
  }
  if (bias.present) {
    check_float(op, "bias", bias, cores.type);
    if (bias.shape.rank != 1 || bias.shape.dim[0] != layout.cols) {
      fail(op, "bias must be (" + text(layout.cols) + "), got shape " + to_string(bias.shape));
    }
  }
  const int64_t tokens = leading(x.shape, axes), many = token_class(tokens) < 8 ? tokens : 64;
  MpoLinearCall call{plan_linear(layout, constant ? many : tokens, constant, mps_method(a)), {}, x.shape};
  const MpsGroups groups{static_cast<int64_t>(call.plan.ends.size()), call.plan.ends.data()};
  call.params = {cores.type, layout, groups, tokens};
  call.y.dim[axes] = layout.cols;
  return call;
}

MpoLinearWeights::MpoLinearWeights(const MpoLinearParams& params, const void* cores, const ParallelFor& parallel)
    : memory_(new char[mpo_linear_cpu_weight_bytes(params) + kAlignment]) {
  const std::unique_ptr<char[]> scratch(new char[mpo_linear_cpu_prepare_scratch_bytes(params)]);
  mpo_linear_cpu_prepare(params, cores, data(), scratch.get(), parallel);
}

void* MpoLinearWeights::data() const {
  return memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment) % kAlignment;
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
