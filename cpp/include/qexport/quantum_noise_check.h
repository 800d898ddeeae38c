// From attributes and tensors, as a framework hands them over, to checked params. Shared by the adapters.
#pragma once

#include <string>
#include <vector>

#include "qexport/noise_channel.h"
#include "qexport/probability_rows.h"
#include "qexport/quantum_measure.h"
#include "qexport/quantum_noise.h"

namespace qexport {

// The attributes of a node, all of them given.
struct QuantumNoiseAttributes {
  NoiseChannelAttributes channel;
  std::string basis;
  int64_t inverse, renormalize;
};

struct QuantumNoiseInputs {
  TensorView probabilities;
  NoiseChannelInputs channel;
  TensorView unitary;  // f32 or f64
};

struct QuantumNoiseCall {
  QuantumNoiseParams params;  // points into what follows, and into the unitary
  NoiseChannel channel;
  std::vector<double> transitions, directions, azimuths;
  ProbabilityRows rows;
  Shape noisy, leak;
};

// Errors, all std::invalid_argument with one line: "[QuantumNoise] level must be in 0 to 1, got 1.5".
void check_attributes(const QuantumNoiseAttributes& attributes);
QuantumNoiseCall resolve_call(const QuantumNoiseAttributes& attributes, const QuantumNoiseInputs& inputs);

struct QuantumMeasureAttributes {
  int64_t shots, layer;
};

struct QuantumMeasureCall {
  QuantumMeasureParams params;
  ProbabilityRows rows;
  Shape frequencies;
};

void check_attributes(const QuantumMeasureAttributes& attributes);
QuantumMeasureCall resolve_call(const QuantumMeasureAttributes& attributes, const TensorView& probabilities, int64_t seed);

}  // namespace qexport
