// Checks of QuantumNoise and QuantumMeasure, and how a qubit is measured behind a channel; the kernels take it as given.
#include "qexport/quantum_noise_check.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <stdexcept>

namespace qexport {
namespace {

using Complex = std::complex<double>;

constexpr const char* kNoise = "QuantumNoise";
constexpr const char* kMeasure = "QuantumMeasure";

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("[QuantumNoise] " + message); }

// Inverting noise that leaves less of a state's strength would leave rounding errors alone.
constexpr double kLeastKept = 1e-6;

double kept_strength(double strength, const std::string& what) {
  if (std::fabs(strength) >= kLeastKept) return strength;
  fail("inverse does not exist: " + what + " keeps " + to_text(strength) + " of its state, the least is " +
       to_text(kLeastKept) + "; take another level");
}

// What finds 0 behind a map: the operator E with P(0) = Tr(E rho), E = (1 + shift + x X + y Y + z Z) / 2. That of 1 is I -
// E, which commutes with it: along their common direction (x, y, z) outcomes turn into each other with probabilities that
// depend on nothing else.
struct Found {
  double shift, x, y, z;

  explicit Found(const QubitMap& map) {
    const double zero = map.at[0][0].real(), one = map.at[0][3].real();
    const Complex coherence = map.at[0][1];
    shift = zero + one - 1.0, z = zero - one;
    x = 2.0 * coherence.real(), y = 2.0 * coherence.imag();
  }
  // P(1 | 0) and P(0 | 1) along an axis on which (x, y, z) is `length`.
  double up(double length) const { return std::clamp((1.0 - shift - length) / 2.0, 0.0, 1.0); }
  double down(double length) const { return std::clamp((1.0 + shift - length) / 2.0, 0.0, 1.0); }
};

// The channel takes outcomes of the basis to outcomes, which is all that is inverted. [[1 - up, down], [up, 1 - down]] has
// an inverse of the same form.
void invert(QuantumNoiseCall& call, const std::vector<QubitMap>& maps, bool basis_x) {
  for (size_t k = 0; k < maps.size(); ++k) {
    const Found found(maps[k]);
    const double across = std::hypot(basis_x ? found.z : found.x, found.y) / 2.0;
    if (!(across <= call.channel.tolerance)) {
      fail("inverse needs a channel that acts on outcomes alone, coherences add up to " + to_text(across) +
           " to those of qubit " + std::to_string(k) + "; take another basis");
    }
    const double length = basis_x ? found.x : found.z, up = found.up(length), down = found.down(length);
    const double divisor = -kept_strength(1.0 - up - down, "qubit " + std::to_string(k));
    call.transitions.insert(call.transitions.end(), {up / divisor, down / divisor});
  }
  call.params.transitions = call.transitions.data();
}

void measure(QuantumNoiseCall& call, const std::vector<QubitMap>& maps) {
  bool turned = false, twisted = false;
  for (const QubitMap& map : maps) {
    const Found found(map);
    // The one of the two opposite directions in which Z and X are along themselves.
    const double sign = found.x + found.z < 0.0 ? -1.0 : 1.0;
    const double length = sign * std::sqrt(found.x * found.x + found.y * found.y + found.z * found.z);
    double angle = 0.0, azimuth = 0.0;
    if (found.y != 0.0) {
      angle = std::atan2(std::hypot(found.x, found.y), sign * found.z);
      azimuth = std::atan2(sign * found.y, sign * found.x);
    } else if (found.x != 0.0) {
      angle = std::atan2(sign * found.x, sign * found.z);
    }
    turned = turned || angle != 0.0, twisted = twisted || azimuth != 0.0;
    call.directions.insert(call.directions.end(), {std::cos(angle / 2.0), std::sin(angle / 2.0)});
    call.azimuths.push_back(azimuth);
    call.transitions.insert(call.transitions.end(), {found.up(length), found.down(length)});
  }
  call.params.directions = turned ? call.directions.data() : nullptr;
  call.params.azimuths = twisted ? call.azimuths.data() : nullptr;
  call.params.transitions = call.transitions.data();
}

void check_unitary(double off, DType type) {
  if (off <= exactness(type)) return;
  fail("unitary must be one within " + to_text(exactness(type)) + ", U^dagger U is off the identity by " + to_text(off));
}

QubitMap gate_map(const TensorView& unitary) {
  Complex gate[4];
  for (int i = 0; i < 4; ++i) gate[i] = {number(unitary, 2 * i), number(unitary, 2 * i + 1)};
  double off = 0.0;
  for (int i = 0; i < 4; ++i) {
    const Complex product = std::conj(gate[i / 2]) * gate[i % 2] + std::conj(gate[2 + i / 2]) * gate[2 + i % 2];
    const double wrong = std::abs(product - (i % 3 ? 0.0 : 1.0));
    off = wrong > off || std::isnan(wrong) ? wrong : off;
  }
  check_unitary(off, unitary.type);
  return map_of_gate(gate);
}

// U^dagger (U v) = v for two vectors of signs, which no difference from a unitary is likely to keep: d^2 steps, where
// U^dagger U takes d^3.
template <class Real>
double deviation(const Real* u, int64_t d) {
  double off = 0.0;
  for (uint64_t trial = 1; trial <= 2; ++trial) {
    std::vector<double> sign(static_cast<size_t>(d)), re(sign.size()), im(sign.size());
    uint64_t random = trial * 0x9E3779B97F4A7C15u;
    for (double& s : sign) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      s = random >> 63 ? 1.0 : -1.0;
    }
    for (int64_t i = 0; i < d; ++i) {
      double real = 0.0, imaginary = 0.0;
      for (int64_t j = 0; j < d; ++j) {
        real += static_cast<double>(u[2 * (i * d + j)]) * sign[static_cast<size_t>(j)];
        imaginary += static_cast<double>(u[2 * (i * d + j) + 1]) * sign[static_cast<size_t>(j)];
      }
      for (int64_t j = 0; j < d; ++j) {
        const double a = static_cast<double>(u[2 * (i * d + j)]), b = static_cast<double>(u[2 * (i * d + j) + 1]);
        re[static_cast<size_t>(j)] += a * real + b * imaginary;
        im[static_cast<size_t>(j)] += a * imaginary - b * real;
      }
    }
    for (size_t j = 0; j < sign.size(); ++j) {
      const double wrong = std::hypot(re[j] - sign[j], im[j]);
      off = wrong > off || std::isnan(wrong) ? wrong : off;
    }
  }
  return off;
}

// A unitary of all qubits, behind the channel.
void measure_behind(QuantumNoiseCall& call, const TensorView& unitary) {
  QuantumNoiseParams& p = call.params;
  const int64_t d = int64_t{1} << p.qubits;
  if (p.qubits > kMaxDensityQubits) {
    fail("unitary of all qubits needs a density matrix, which takes 268 MB a thread for " +
         std::to_string(kMaxDensityQubits) + " qubits, the most, got " + std::to_string(p.qubits) +
         "; a gate (2, 2, 2) on every qubit has no limit");
  }
  const Shape& shape = unitary.shape;
  if (shape.rank != 3 || shape.dim[0] != d || shape.dim[1] != d || shape.dim[2] != 2) {
    const std::string states = std::to_string(d);
    fail("unitary has shape " + to_string(shape) + ", expected (2, 2, 2) or (" + states + ", " + states +
         ", 2), real and imaginary parts last");
  }
  check_unitary(unitary.type == DType::f64 ? deviation(static_cast<const double*>(unitary.data), d)
                                           : deviation(static_cast<const float*>(unitary.data), d),
                unitary.type);
  p.maps = reinterpret_cast<const double*>(call.channel.maps.data());
  p.real_maps = is_real(call.channel.maps);
  p.unitary = unitary.data, p.unitary_type = unitary.type;
}

}  // namespace

void check_attributes(const QuantumNoiseAttributes& a) {
  check_attributes(kNoise, a.channel);
  check_choice(kNoise, "basis", a.basis, {"z", "x"});
  const auto flag = [](const char* name, int64_t value) {
    if (value != 0 && value != 1) fail(std::string(name) + " must be one of 0, 1, got " + std::to_string(value));
  };
  flag("inverse", a.inverse);
  flag("renormalize", a.renormalize);
}

QuantumNoiseCall resolve_call(const QuantumNoiseAttributes& a, const QuantumNoiseInputs& in) {
  QuantumNoiseCall call{};
  call.rows = probability_rows(kNoise, in.probabilities, 2);
  call.noisy = call.leak = in.probabilities.shape;
  --call.leak.rank;
  const int qubits = num_qubits(call.rows.n);
  call.channel = resolve_channel(kNoise, a.channel, in.channel, qubits);
  QuantumNoiseParams& p = call.params;
  p.type = call.rows.type, p.rows = call.rows.rows, p.n = call.rows.n, p.qubits = qubits;
  p.uniform = call.channel.uniform;
  p.renormalize = a.renormalize != 0;
  const bool basis_x = a.basis == "x", readout = a.channel.channel == "readout", gate = in.unitary.present;
  if (gate && basis_x) fail("basis must be z with a unitary, got x; multiply the Hadamard gates into it");
  if (gate && a.inverse) fail("inverse takes noise off outcomes, which have no unitary behind them; leave it out");
  const bool one_qubit = gate && in.unitary.shape.rank == 3 && in.unitary.shape.dim[0] == 2 &&
                         in.unitary.shape.dim[1] == 2 && in.unitary.shape.dim[2] == 2;
  if (gate && !one_qubit) {
    if (readout) fail("unitary of all qubits is behind the channel, and readout behind it; give it a node of its own");
    measure_behind(call, in.unitary);
    return call;
  }
  std::vector<QubitMap>& maps = call.channel.maps;
  if (gate || (basis_x && !(readout && a.inverse))) {
    const double root = std::sqrt(0.5);
    const QubitMap turn = gate ? gate_map(in.unitary) : map_of_gate({root, root, root, -root});
    for (QubitMap& map : maps) map = readout ? composed(map, turn) : composed(turn, map);
  }
  if (!a.inverse) {
    measure(call, maps);
    return call;
  }
  if (p.uniform != 0.0) p.uniform = -p.uniform / kept_strength(1.0 - p.uniform, "the register");
  invert(call, maps, basis_x && !readout);
  return call;
}

void check_attributes(const QuantumMeasureAttributes& a) {
  const auto check = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw std::invalid_argument("[QuantumMeasure] " + std::string(name) + " must be in " + std::to_string(least) + " to " +
                                std::to_string(most) + ", got " + std::to_string(value));
  };
  check("shots", a.shots, 1, INT32_MAX);
  check("layer", a.layer, 0, UINT32_MAX);
}

QuantumMeasureCall resolve_call(const QuantumMeasureAttributes& a, const TensorView& probabilities, int64_t seed) {
  const ProbabilityRows rows = probability_rows(kMeasure, probabilities, 1);
  const Shape& shape = probabilities.shape;
  const int64_t queries = shape.rank > 1 ? shape.dim[shape.rank - 2] : 1;
  return {{rows.type, rows.rows, rows.n, queries, a.shots, static_cast<uint32_t>(a.layer), seed}, rows, shape};
}

}  // namespace qexport
