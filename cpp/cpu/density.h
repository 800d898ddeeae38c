// Density matrices of noisy registers, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace qexport {

// Elements from one row of a matrix of d x d to the next: whole vectors of every instruction set, and no power of two, whose
// rows would all lie in the same few sets of the cache.
inline int64_t density_stride(int64_t d) { return (d + 15) / 16 * 16 + 16; }

template <class Real>
struct DensityKernels {
  int64_t width;  // states of a panel: they lie side by side, element j of state s at [j * width + s]

  // rho = (M_{q-1} x ... x M_0)(state state^T): maps (qubits, 4, 4) complex, state (2^qubits), zeros up to a whole vector
  // behind it; re and im (2^qubits, stride). With im null the imaginary parts of the maps are taken to be 0.
  void (*evolve)(int qubits, const double* maps, const Real* state, Real* re, Real* im);

  // out[s] = v^dagger rho v of the `width` states v of a panel. rho is Hermitian, im null: real. panel_im null: the states
  // are real. Panels are d * width.
  void (*forms)(int64_t d, const Real* re, const Real* im, const Real* panel_re, const Real* panel_im, Real* out);
};

}  // namespace qexport
