// The one place where the parameters of channels are checked and become maps of density matrices; what stands behind it
// takes them as given.
#include "qexport/noise_channel.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "qexport/probability_rows.h"

namespace qexport {
namespace {

using Complex = std::complex<double>;

// What a channel that knows the Z axis does to a qubit: P(1 | 0), P(0 | 1), and the factors of element 01 in itself and
// in 10.
struct Effect {
  double up, down, kept, swapped;
};

class Resolver {
 public:
  Resolver(const char* op_name, const NoiseChannelAttributes& attributes, const NoiseChannelInputs& inputs, int qubits)
      : op_name_(op_name), a_(attributes), in_(inputs), qubits_(qubits) {}

  NoiseChannel channel() const {
    NoiseChannel result{{}, 0.0, exactness(a_.channel == "kraus" ? in_.kraus.type : DType::f64)};
    if (a_.scope == "global") {
      const std::vector<double> level = per_qubit("level", in_.level);
      for (const double l : level) {
        if (l != level[0]) fail("level must be one number with scope global, got one per qubit that differ");
      }
      result.uniform = replaced_share(level[0], qubits_);
      result.maps.assign(level.size(), map_of({0.0, 0.0, 1.0, 0.0}));
    } else if (a_.channel == "kraus") {
      result.maps = kraus();
    } else {
      for (const Effect& effect : effects()) result.maps.push_back(map_of(effect));
    }
    return result;
  }

  void check_inputs() const {
    const std::pair<const char*, const TensorView*> only[] = {
        {"T1", &in_.t1}, {"T2", &in_.t2}, {"excited_population", &in_.excited_population}, {"kraus", &in_.kraus}};
    for (const auto& [name, tensor] : only) {
      const std::string channel = tensor == &in_.kraus ? "kraus" : "thermal_relaxation";
      if (!tensor->present || a_.channel == channel) continue;
      fail(std::string(name) + " is for channel " + channel + ", got " + a_.channel + "; leave it out");
    }
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw std::invalid_argument("[" + std::string(op_name_) + "] " + message);
  }

  double within(const char* name, double value, double most, const std::string& why = "") const {
    if (value >= 0.0 && value <= most) return value;
    fail(std::string(name) + " must be in 0 to " + to_text(most) + why + ", got " + to_text(value));
  }

  // A parameter of each qubit: one number for all, or one for each.
  std::vector<double> per_qubit(const char* name, const TensorView& tensor) const {
    if (!tensor.present) fail(std::string(name) + " is missing; thermal_relaxation needs it");
    const Shape& shape = tensor.shape;
    const int64_t count = shape.rank == 0 ? 1 : shape.dim[0];
    if (shape.rank > 1 || (count != 1 && count != qubits_)) {
      const std::string q = std::to_string(qubits_);
      fail(std::string(name) + " has shape " + to_string(shape) + ", expected one number or (" + q + ",), one per qubit");
    }
    std::vector<double> values(static_cast<size_t>(qubits_));
    for (size_t k = 0; k < values.size(); ++k) values[k] = number(tensor, count == 1 ? 0 : static_cast<int64_t>(k));
    return values;
  }

  // The share l of (1 - l) rho + l I / 2^width that a depolarizing level means, for a channel on `width` qubits.
  double replaced_share(double level, int width) const {
    const double states = std::ldexp(1.0, 2 * width), most = states / (states - 1.0);
    if (a_.convention == "error") return within("level", level, 1.0) * most;
    return within("level", level, most,
                  " with convention replace on " + std::to_string(width) + (width > 1 ? " qubits" : " qubit"));
  }

  std::vector<Effect> thermal() const {
    const std::vector<double> time = per_qubit("level", in_.level);
    const std::vector<double> t1 = per_qubit("T1", in_.t1), t2 = per_qubit("T2", in_.t2);
    std::vector<double> excited(time.size(), 0.0);
    if (in_.excited_population.present) excited = per_qubit("excited_population", in_.excited_population);
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
      effects.push_back({excited[k] * relaxed, (1.0 - excited[k]) * relaxed, std::exp(-time[k] / t2[k]), 0.0});
    }
    return effects;
  }

  std::vector<Effect> readout() const {
    const Shape& shape = in_.level.shape;
    const bool two = shape.rank == 2 && shape.dim[1] == 2 && (shape.dim[0] == 1 || shape.dim[0] == qubits_);
    if (shape.rank > 1 && !two) {
      const std::string q = std::to_string(qubits_);
      fail("level has shape " + to_string(shape) + ", expected one number, (" + q + ",), (1, 2) or (" + q + ", 2)");
    }
    std::vector<Effect> effects;
    const std::vector<double> same = two ? std::vector<double>() : per_qubit("level", in_.level);
    for (int k = 0; k < qubits_; ++k) {
      const int64_t row = shape.rank == 2 && shape.dim[0] > 1 ? k : 0;
      const double up = two ? number(in_.level, 2 * row) : same[static_cast<size_t>(k)];
      const double down = two ? number(in_.level, 2 * row + 1) : up;
      effects.push_back({within("level", up, 1.0), within("level", down, 1.0), 0.0, 0.0});
    }
    return effects;
  }

  std::vector<Effect> effects() const {
    if (a_.channel == "thermal_relaxation") return thermal();
    if (a_.channel == "readout") return readout();
    std::vector<Effect> effects;
    for (double l : per_qubit("level", in_.level)) {
      if (a_.channel == "depolarizing") {
        l = replaced_share(l, 1);
        effects.push_back({l / 2.0, l / 2.0, 1.0 - l, 0.0});
        continue;
      }
      within("level", l, 1.0);
      if (a_.channel == "amplitude_damping") effects.push_back({0.0, l, std::sqrt(1.0 - l), 0.0});
      if (a_.channel == "phase_damping") effects.push_back({0.0, 0.0, std::sqrt(1.0 - l), 0.0});
      if (a_.channel == "bit_flip") effects.push_back({l, l, 1.0 - l, l});
      if (a_.channel == "phase_flip") effects.push_back({0.0, 0.0, 1.0 - 2.0 * l, 0.0});
    }
    return effects;
  }

  static QubitMap map_of(const Effect& effect) {
    QubitMap map{};
    map.at[0][0] = 1.0 - effect.up, map.at[0][3] = effect.down;
    map.at[3][0] = effect.up, map.at[3][3] = 1.0 - effect.down;
    map.at[1][1] = map.at[2][2] = effect.kept;
    map.at[1][2] = map.at[2][1] = effect.swapped;
    return map;
  }

  // sum_a K_a rho K_a^dagger, with probability `level`.
  std::vector<QubitMap> kraus() const {
    if (!in_.kraus.present) fail("kraus is missing; channel kraus needs it");
    const Shape& shape = in_.kraus.shape;
    const int first = shape.rank - 4;
    bool fits = (first == 0 || (first == 1 && shape.dim[0] == qubits_)) && shape.dim[first] > 0;
    for (int axis = first + 1; fits && axis < shape.rank; ++axis) fits = shape.dim[axis] == 2;
    if (!fits) {
      fail("kraus has shape " + to_string(shape) + ", expected (operators, 2, 2, 2) or (" + std::to_string(qubits_) +
           ", operators, 2, 2, 2), real and imaginary parts last");
    }
    const std::vector<double> level = per_qubit("level", in_.level);
    std::vector<QubitMap> maps;
    for (int k = 0; k < qubits_; ++k) {
      const double strength = within("level", level[static_cast<size_t>(k)], 1.0);
      QubitMap map = map_of({0.0, 0.0, 1.0 - strength, 0.0});
      map.at[0][0] = map.at[3][3] = 1.0 - strength;
      for (int64_t op = 0; op < shape.dim[first]; ++op) {
        Complex gate[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t place = ((first ? k * shape.dim[first] : 0) + op) * 8 + 2 * i;
          gate[i] = {number(in_.kraus, place), number(in_.kraus, place + 1)};
        }
        const QubitMap one = map_of_gate(gate);
        for (int i = 0; i < 16; ++i) map.at[i / 4][i % 4] += strength * one.at[i / 4][i % 4];
      }
      check_trace(map, strength);
      maps.push_back(map);
    }
    return maps;
  }

  // The trace of what 00, 01, 10 and 11 become is 1, 0, 0 and 1 where the operators sum to the identity.
  void check_trace(const QubitMap& map, double strength) const {
    if (strength == 0.0) return;
    double off = 0.0;
    for (int i = 0; i < 4; ++i) {
      const double wrong = std::abs(map.at[0][i] + map.at[3][i] - (i % 3 ? 0.0 : 1.0));
      off = wrong > off || std::isnan(wrong) ? wrong : off;
    }
    if (off <= exactness(in_.kraus.type) * strength) return;
    fail("Kraus operators must sum to the identity within " + to_text(exactness(in_.kraus.type)) + ", they are off by " +
         to_text(off / strength));
  }

  const char* op_name_;
  const NoiseChannelAttributes& a_;
  const NoiseChannelInputs& in_;
  int qubits_;
};

}  // namespace

double exactness(DType type) { return type == DType::f64 ? 1e-10 : 1e-6; }

QubitMap map_of_gate(const Complex (&gate)[4]) {
  QubitMap map;
  for (int i = 0; i < 16; ++i) {
    const int to = i / 4, from = i % 4;
    map.at[to][from] = gate[to / 2 * 2 + from / 2] * std::conj(gate[to % 2 * 2 + from % 2]);
  }
  return map;
}

QubitMap composed(const QubitMap& outer, const QubitMap& inner) {
  QubitMap map{};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 4; ++k) map.at[i][j] += outer.at[i][k] * inner.at[k][j];
    }
  }
  return map;
}

bool is_real(const std::vector<QubitMap>& maps) {
  for (const QubitMap& map : maps) {
    for (const auto& row : map.at) {
      for (const Complex& element : row) {
        if (element.imag() != 0.0) return false;
      }
    }
  }
  return true;
}

double number(const TensorView& tensor, int64_t i) {
  if (tensor.type == DType::f64) return static_cast<const double*>(tensor.data)[i];
  return static_cast<const float*>(tensor.data)[i];
}

int num_qubits(int64_t n) {
  int qubits = 0;
  while ((int64_t{1} << qubits) < n) ++qubits;
  return qubits;
}

void check_choice(const char* op_name, const char* attribute, const std::string& value,
                  const std::vector<const char*>& choices) {
  std::string known;
  for (const char* choice : choices) {
    if (value == choice) return;
    known += (known.empty() ? "" : ", ") + std::string(choice);
  }
  throw std::invalid_argument("[" + std::string(op_name) + "] " + attribute + " must be one of " + known + ", got '" +
                              value + "'");
}

void check_attributes(const char* op_name, const NoiseChannelAttributes& a) {
  check_choice(op_name, "channel", a.channel,
               {"depolarizing", "amplitude_damping", "phase_damping", "thermal_relaxation", "bit_flip", "phase_flip",
                "readout", "kraus"});
  check_choice(op_name, "scope", a.scope, {"local", "global"});
  check_choice(op_name, "convention", a.convention, {"replace", "error"});
  const auto only_plain = [&](const char* name, const std::string& value, const char* plain) {
    if (a.channel == "depolarizing" || value == plain) return;
    throw std::invalid_argument("[" + std::string(op_name) + "] " + name + " must be " + plain + " with channel " +
                                a.channel + ", got " + value + "; only depolarizing has others");
  };
  only_plain("scope", a.scope, "local");
  only_plain("convention", a.convention, "replace");
}

NoiseChannel resolve_channel(const char* op_name, const NoiseChannelAttributes& attributes, const NoiseChannelInputs& inputs,
                             int qubits) {
  const Resolver resolver(op_name, attributes, inputs, qubits);
  resolver.check_inputs();
  return resolver.channel();
}

}  // namespace qexport
