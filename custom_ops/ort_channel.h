// The inputs of a noise channel, which QuantumNoise and QuantumOverlap share.
#pragma once

#include "ort_api.h"
#include "qexport/noise_channel.h"

namespace qexport {

// level, T1, T2, excited_population and kraus, from input `first` on.
inline NoiseChannelInputs ort_channel(const OrtKernelContext* context, size_t first, const char* op_name) {
  return {ort_input(context, first, op_name, "level"), ort_input(context, first + 1, op_name, "T1"),
          ort_input(context, first + 2, op_name, "T2"), ort_input(context, first + 3, op_name, "excited_population"),
          ort_input(context, first + 4, op_name, "kraus", 5)};
}

}  // namespace qexport
