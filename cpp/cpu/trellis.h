// The part of the trellis encoder that is compiled once per instruction set.
#pragma once

#include "qexport/trellis.h"

namespace qexport {

// Numbers that are decided at once: the string goes on from the best end of those before.
constexpr int64_t kTrellisStretch = 2048;

struct TrellisKernels {
  // One row; scratch of trellis_row_bytes.
  void (*encode_row)(const TrellisParams&, const float* values, const float* table, uint16_t* windows, char* scratch);
};

inline size_t trellis_row_bytes(const TrellisParams& p) {
  const size_t windows = size_t{1} << kTrellisWindow, states = windows >> p.bits;
  const size_t steps = static_cast<size_t>(p.columns < kTrellisStretch ? p.columns : kTrellisStretch);
  return (windows + 2 * states) * sizeof(float) + steps * states;
}

}  // namespace qexport
