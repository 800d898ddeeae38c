#include "qexport/quantum_overlap_check.h"

#include <stdexcept>

namespace qexport {
namespace {

constexpr const char* kName = "QuantumOverlap";

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("[QuantumOverlap] " + message); }

void check_shapes(const TensorView& queries, const TensorView& keys) {
  if (queries.type == DType::boolean || queries.type == DType::i64) {
    fail("queries must be float32, float16, bfloat16 or float64");
  }
  if (keys.type != queries.type) fail("keys must be of the type of queries");
  const Shape &q = queries.shape, &k = keys.shape;
  if (q.rank < 2) fail("queries must have 2 to 4 dimensions, got " + std::to_string(q.rank));
  if (q.dim[q.rank - 1] < 2) fail("queries must have rows of >= 2 numbers, got " + std::to_string(q.dim[q.rank - 1]));
  bool fits = k.rank == q.rank;
  for (int axis = 0; fits && axis < q.rank; ++axis) fits = axis == q.rank - 2 || k.dim[axis] == q.dim[axis];
  if (!fits) {
    fail("keys have shape " + to_string(k) + ", expected that of the queries, " + to_string(q) +
         ", but for the last dimension but one");
  }
}

// Whether a map multiplies the elements 01 and 10 by a real factor and does nothing else. Then so does the channel, and
// overlaps of real states need no density matrix.
bool keeps_diagonal(const QubitMap& map) {
  for (int i = 0; i < 16; ++i) {
    const std::complex<double> element = map.at[i / 4][i % 4];
    const bool factor = i == 5 || i == 10, one = i == 0 || i == 15;
    if (element.imag() != 0.0 || (!factor && element.real() != (one ? 1.0 : 0.0))) return false;
  }
  return true;
}

}  // namespace

QuantumOverlapCall resolve_overlap(const NoiseChannelAttributes& attributes, const QuantumOverlapInputs& in) {
  check_shapes(in.queries, in.keys);
  QuantumOverlapCall call{};
  const Shape& shape = in.queries.shape;
  call.overlaps = shape;
  call.overlaps.dim[shape.rank - 1] = in.keys.shape.dim[shape.rank - 2];
  QuantumOverlapParams& p = call.params;
  p.type = in.queries.type;
  p.batch = 1;
  for (int axis = 0; axis + 2 < shape.rank; ++axis) p.batch *= shape.dim[axis];
  p.queries = shape.dim[shape.rank - 2], p.keys = in.keys.shape.dim[shape.rank - 2], p.size = shape.dim[shape.rank - 1];
  p.qubits = num_qubits(p.size);
  call.channel = resolve_channel(kName, attributes, in.channel, p.qubits);
  p.uniform = call.channel.uniform;
  const std::vector<QubitMap>& maps = call.channel.maps;
  for (const QubitMap& map : maps) {
    if (keeps_diagonal(map)) call.coherences.push_back(map.at[1][1].real());
  }
  if (call.coherences.size() == maps.size()) {
    p.coherences = call.coherences.data();
  } else {
    check_density_qubits(kName, "a channel that changes populations", p.qubits,
                         "phase_damping and phase_flip have no limit");
    p.maps = reinterpret_cast<const double*>(maps.data());
    p.real_maps = is_real(maps);
  }
  return call;
}

}  // namespace qexport
