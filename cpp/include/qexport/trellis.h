// Trellis-coded quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990) with the trellis of a shift register, as
// in QTIP (Tseng et al., NeurIPS 2024): a row of numbers becomes a string of symbols of a few bits, and the last
// kTrellisWindow bits up to a symbol pick its value from a table. Windows overlap, so that each number has as many values as
// the table, while it costs `bits` bits. The Viterbi algorithm finds the string with the least squared error.
#pragma once

#include <cstdint>

#include "qexport/parallel.h"

namespace qexport {

constexpr int kTrellisWindow = 12;
constexpr int kTrellisMaxBits = 6;

struct TrellisParams {
  int64_t rows, columns;
  int bits;  // of a symbol, 1 .. kTrellisMaxBits
};

struct TrellisTensors {
  const float* values;  // (rows, columns); NaN where any value will do
  const float* table;   // (2^kTrellisWindow)
  uint16_t* windows;  // (rows, columns): the window of each number; its low `bits` bits are the symbol. Zeros precede a row.
};

size_t trellis_encode_cpu_scratch_bytes(const TrellisParams& params, const ParallelFor& parallel);
void trellis_encode_cpu(const TrellisParams& params, const TrellisTensors& tensors, void* scratch,
                        const ParallelFor& parallel);

}  // namespace qexport
