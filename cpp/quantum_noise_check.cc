// The one place where the parameters of channels are checked and become transition probabilities; the kernels behind it take
// them as given.
#include "qexport/quantum_noise_check.h"

#include <climits>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace qexport {
namespace {

constexpr const char* kNoise = "QuantumNoise";
constexpr const char* kMeasure = "QuantumMeasure";

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("[QuantumNoise] " + message); }

void check_choice(const char* attribute, const std::string& value, const std::vector<const char*>& choices) {
  std::string known;
  for (const char* choice : choices) {
    if (value == choice) return;
    known += (known.empty() ? "" : ", ") + std::string(choice);
  }
  fail(std::string(attribute) + " must be one of " + known + ", got '" + value + "'");
}

double number(const TensorView& tensor, int64_t i) {
  if (tensor.type == DType::f64) return static_cast<const double*>(tensor.data)[i];
  return static_cast<const float*>(tensor.data)[i];
}

double within(const char* name, double value, double most, const std::string& why = "") {
  if (value >= 0.0 && value <= most) return value;
  fail(std::string(name) + " must be in 0 to " + to_text(most) + why + ", got " + to_text(value));
}

// A parameter of each qubit: one number for all, or one for each.
std::vector<double> per_qubit(const char* name, const TensorView& tensor, int qubits) {
  if (!tensor.present) fail(std::string(name) + " is missing; thermal_relaxation needs it");
  const Shape& shape = tensor.shape;
  const int64_t count = shape.rank == 0 ? 1 : shape.dim[0];
  if (shape.rank > 1 || (count != 1 && count != qubits)) {
    const std::string q = std::to_string(qubits);
    fail(std::string(name) + " has shape " + to_string(shape) + ", expected one number or (" + q + ",), one per qubit");
  }
  std::vector<double> values(static_cast<size_t>(qubits));
  for (size_t k = 0; k < values.size(); ++k) values[k] = number(tensor, count == 1 ? 0 : static_cast<int64_t>(k));
  return values;
}

// The share l of (1 - l) rho + l I / 2^width that a depolarizing level means, for a channel on `width` qubits.
double replaced_share(const QuantumNoiseAttributes& a, double level, int width) {
  const double states = std::ldexp(1.0, 2 * width), most = states / (states - 1.0);
  if (a.convention == "error") return within("level", level, 1.0) * most;
  return within("level", level, most,
                " with convention replace on " + std::to_string(width) + (width > 1 ? " qubits" : " qubit"));
}

// P(1 | 0) and P(0 | 1) of a qubit's measurement, and the factor c of its coherence.
struct Effect {
  double up, down, coherence;
};

std::vector<Effect> thermal(const QuantumNoiseInputs& in, int qubits) {
  const std::vector<double> time = per_qubit("level", in.level, qubits);
  const std::vector<double> t1 = per_qubit("T1", in.t1, qubits), t2 = per_qubit("T2", in.t2, qubits);
  std::vector<double> excited(time.size(), 0.0);
  if (in.excited_population.present) excited = per_qubit("excited_population", in.excited_population, qubits);
  std::vector<Effect> effects;
  for (size_t k = 0; k < time.size(); ++k) {
    if (!(t1[k] > 0.0)) fail("T1 must be > 0, got " + to_text(t1[k]));
    if (!(t2[k] > 0.0)) fail("T2 must be > 0, got " + to_text(t2[k]));
    if (t2[k] > 2.0 * t1[k]) fail("T2 must be at most 2 T1 = " + to_text(2.0 * t1[k]) + ", got " + to_text(t2[k]));
    if (!(time[k] >= 0.0 && std::isfinite(time[k]))) {
      fail("level must be a time >= 0 with thermal_relaxation, got " + to_text(time[k]));
    }
    within("excited_population", excited[k], 1.0);
    const double relaxed = -std::expm1(-time[k] / t1[k]);
    effects.push_back({excited[k] * relaxed, (1.0 - excited[k]) * relaxed, std::exp(-time[k] / t2[k])});
  }
  return effects;
}

std::vector<Effect> readout(const TensorView& level, int qubits) {
  const Shape& shape = level.shape;
  const bool two = shape.rank == 2 && shape.dim[1] == 2 && (shape.dim[0] == 1 || shape.dim[0] == qubits);
  if (shape.rank > 1 && !two) {
    const std::string q = std::to_string(qubits);
    fail("level has shape " + to_string(shape) + ", expected one number, (" + q + ",), (1, 2) or (" + q + ", 2)");
  }
  std::vector<Effect> effects;
  const std::vector<double> same = two ? std::vector<double>() : per_qubit("level", level, qubits);
  for (int k = 0; k < qubits; ++k) {
    const int64_t row = shape.rank == 2 && shape.dim[0] > 1 ? k : 0;
    const double up = two ? number(level, 2 * row) : same[static_cast<size_t>(k)];
    const double down = two ? number(level, 2 * row + 1) : up;
    effects.push_back({within("level", up, 1.0), within("level", down, 1.0), 0.0});
  }
  return effects;
}

std::vector<Effect> effects_of(const QuantumNoiseAttributes& a, const QuantumNoiseInputs& in, int qubits) {
  if (a.channel == "thermal_relaxation") return thermal(in, qubits);
  if (a.channel == "readout") return readout(in.level, qubits);
  std::vector<Effect> effects;
  for (double l : per_qubit("level", in.level, qubits)) {
    if (a.channel == "depolarizing") {
      l = replaced_share(a, l, 1);
      effects.push_back({l / 2.0, l / 2.0, 1.0 - l});
      continue;
    }
    within("level", l, 1.0);
    if (a.channel == "amplitude_damping") effects.push_back({0.0, l, std::sqrt(1.0 - l)});
    if (a.channel == "phase_damping") effects.push_back({0.0, 0.0, std::sqrt(1.0 - l)});
    if (a.channel == "bit_flip") effects.push_back({l, l, 1.0});
    if (a.channel == "phase_flip") effects.push_back({0.0, 0.0, 1.0 - 2.0 * l});
  }
  return effects;
}

// Inverting noise that leaves less of a state's strength would leave rounding errors alone.
constexpr double kLeastKept = 1e-6;

double kept_strength(double strength, const std::string& what) {
  if (std::fabs(strength) >= kLeastKept) return strength;
  fail("inverse does not exist: " + what + " keeps " + to_text(strength) + " of its state, the least is " +
       to_text(kLeastKept) + "; take another level");
}

int num_qubits(int64_t n) {
  int qubits = 0;
  while ((int64_t{1} << qubits) < n) ++qubits;
  return qubits;
}

}  // namespace

void check_attributes(const QuantumNoiseAttributes& a) {
  check_choice(
      "channel", a.channel,
      {"depolarizing", "amplitude_damping", "phase_damping", "thermal_relaxation", "bit_flip", "phase_flip", "readout"});
  check_choice("scope", a.scope, {"local", "global"});
  check_choice("convention", a.convention, {"replace", "error"});
  check_choice("basis", a.basis, {"z", "x"});
  const auto only_plain = [&](const char* name, const std::string& value, const char* plain) {
    if (a.channel == "depolarizing" || value == plain) return;
    fail(std::string(name) + " must be " + plain + " with channel " + a.channel + ", got " + value +
         "; only depolarizing has others");
  };
  only_plain("scope", a.scope, "local");
  only_plain("convention", a.convention, "replace");
  const auto flag = [](const char* name, int64_t value) {
    if (value != 0 && value != 1) fail(std::string(name) + " must be one of 0, 1, got " + std::to_string(value));
  };
  flag("inverse", a.inverse);
  flag("renormalize", a.renormalize);
}

QuantumNoiseCall resolve_call(const QuantumNoiseAttributes& a, const QuantumNoiseInputs& in) {
  QuantumNoiseCall call{};
  call.rows = probability_rows(kNoise, in.probabilities, 1);
  call.noisy = call.leak = in.probabilities.shape;
  --call.leak.rank;
  const std::pair<const char*, const TensorView*> thermal_only[] = {
      {"T1", &in.t1}, {"T2", &in.t2}, {"excited_population", &in.excited_population}};
  for (const auto& [name, tensor] : thermal_only) {
    if (!tensor->present || a.channel == "thermal_relaxation") continue;
    fail(std::string(name) + " is for channel thermal_relaxation, got " + a.channel + "; leave it out");
  }
  const int qubits = num_qubits(call.rows.n);
  QuantumNoiseParams& p = call.params;
  p = {call.rows.type, call.rows.rows, call.rows.n, qubits, a.basis == "x" && !a.inverse, nullptr, 0.0, a.renormalize != 0};
  if (qubits == 0) return call;
  if (a.scope == "global") {
    const std::vector<double> level = per_qubit("level", in.level, qubits);
    for (const double l : level) {
      if (l != level[0]) fail("level must be one number with scope global, got one per qubit that differ");
    }
    p.uniform = replaced_share(a, level[0], qubits);
    if (a.inverse) p.uniform = -p.uniform / kept_strength(1.0 - p.uniform, "the register");
    return call;
  }
  for (const Effect& effect : effects_of(a, in, qubits)) {
    const bool flips = a.basis == "x" && a.channel != "readout";
    const double flip = (1.0 - effect.coherence) / 2.0, up = flips ? flip : effect.up, down = flips ? flip : effect.down;
    // The inverse of [[1 - up, down], [up, 1 - down]] has the same form.
    const double qubit = static_cast<double>(call.transitions.size() / 2);
    const double divisor = a.inverse ? -kept_strength(1.0 - up - down, "qubit " + to_text(qubit)) : 1.0;
    call.transitions.insert(call.transitions.end(), {up / divisor, down / divisor});
  }
  p.transitions = call.transitions.data();
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
