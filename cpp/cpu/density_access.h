// The density kernels of the instruction set in use, by the type that they work in.
#pragma once

#include "kernels.h"

namespace qexport {

template <class Real>
const DensityKernels<Real>& density();
template <>
inline const DensityKernels<float>& density<float>() {
  return *kernels().density_f32;
}
template <>
inline const DensityKernels<double>& density<double>() {
  return *kernels().density_f64;
}

}  // namespace qexport
