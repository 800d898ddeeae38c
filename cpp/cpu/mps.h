// The part of the MPS kernels that is compiled once per instruction set.
#pragma once

#include "qexport/mps_encode.h"

namespace qexport {

struct MpsKernels {
  MpsStatus (*encode)(const MpsEncodeParams&, const MpsEncodeTensors&, const ParallelFor&);
};

}  // namespace qexport
