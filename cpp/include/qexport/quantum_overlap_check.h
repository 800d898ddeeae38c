// From attributes and tensors, as a framework hands them over, to checked params. Shared by the adapters.
#pragma once

#include "qexport/noise_channel.h"
#include "qexport/quantum_overlap.h"

namespace qexport {

struct QuantumOverlapInputs {
  TensorView queries, keys;
  NoiseChannelInputs channel;
};

struct QuantumOverlapCall {
  QuantumOverlapParams params;  // points into what follows
  NoiseChannel channel;
  std::vector<double> coherences;
  Shape overlaps;
};

// Errors, all std::invalid_argument with one line.
QuantumOverlapCall resolve_overlap(const NoiseChannelAttributes& attributes, const QuantumOverlapInputs& inputs);

}  // namespace qexport
