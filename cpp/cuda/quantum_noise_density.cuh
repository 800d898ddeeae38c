// Kernels for density matrices of noisy registers: amplitudes, the maps of the channel on two qubits at a time, and the
// quadratic forms of the rows of the unitary as tiles of a product.
#pragma once

#include <algorithm>

#include "quantum_noise.cuh"

namespace qexport {
namespace cuda {

constexpr int kDensityThreads = 256;
constexpr size_t kMatrixBytes = size_t{512} << 20;  // of the rows that are worked on at once, if one takes less
constexpr int64_t kMostDensityRows = 65535;         // what a grid takes
constexpr int kPieceBytes = 32000;                  // what a kernel takes as parameters, since CUDA 12.1
constexpr int kFormEdge = 64, kFormDepth = 16;      // of the product: states and rows of a matrix, and steps
constexpr int kFormEach = 4;                        // of the tile's edges, a thread's share

// Scratch of `rows` rows at once.
template <class Real>
struct DensityMatrices {
  int qubits;
  int64_t rows;
  Real *re, *im;     // (rows, 2^qubits, 2^qubits); im null: 0
  Real* unitary;     // (2^qubits, 2^qubits, 2)
  Real* amplitudes;  // (rows, 2^qubits)
  Real* found;       // (rows, 2^qubits), probabilities behind the unitary

  // Returns how many numbers it lays out from `memory`.
  int64_t lay_out(const QuantumNoiseParams& p, void* memory) {
    const int64_t states = int64_t{1} << p.qubits, size = states * states, planes = p.real_maps ? 1 : 2;
    const int64_t fit = static_cast<int64_t>(kMatrixBytes / sizeof(Real)) / (planes * size);
    qubits = p.qubits, rows = std::min({p.rows, kMostDensityRows, std::max(fit, int64_t{1})});
    re = static_cast<Real*>(memory);
    im = p.real_maps ? nullptr : re + rows * size;
    unitary = re + planes * rows * size;
    amplitudes = unitary + 2 * size;
    found = amplitudes + rows * states;
    return rows * (planes * size + 2 * states) + 2 * size;
  }
};

// Numbers of the host as parameters of a kernel: a graph that captures the call has them, whatever becomes of their memory.
template <class Real>
struct ParameterPiece {
  static constexpr int kNumbers = kPieceBytes / static_cast<int>(sizeof(Real));
  Real number[kNumbers];
};
template <class Real>
__global__ void unpack_kernel(const __grid_constant__ ParameterPiece<Real> piece, int count, Real* to) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = piece.number[i];
}

// A row's square roots, with zeros from n on; NaN where it holds no probabilities.
template <class T, class Real>
__global__ void amplitudes_kernel(const T* probabilities, int64_t n, int qubits, double tolerance, Real* amplitudes) {
  __shared__ double parts[kWarp];
  const T* row = probabilities + static_cast<int64_t>(blockIdx.x) * n;
  Real* to = amplitudes + (static_cast<int64_t>(blockIdx.x) << qubits);
  double sum = 0.0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) sum += summand(to_real(row[j]));
  const bool good = is_distribution(block_sum(sum, parts), tolerance);
  for (int64_t j = threadIdx.x; j < int64_t{1} << qubits; j += blockDim.x) {
    const Real x = j < n ? to_real(row[j]) : Real{0};
    to[j] = good ? static_cast<Real>(sqrt(x)) : not_a_number<Real>();
  }
}

// (re, im) of the elements (r, c) -> 2 r + c of a qubit's map, four each.
template <class Real>
struct QubitMap {
  Real re[4][4], im[4][4];

  explicit QubitMap(const double* map) {
    for (int i = 0; i < 32; ++i) (i % 2 ? im : re)[i / 8][i / 2 % 4] = static_cast<Real>(map[i]);
  }
};
template <class Real, int kQubits>
struct QubitMaps {
  QubitMap<Real> qubit[kQubits];
};

// The maps of kQubits qubits from `qubit` on, on all elements that differ in these bits of their row and column. `first`:
// the matrix is still that of the amplitudes.
template <class Real, int kQubits>
__global__ void __launch_bounds__(kDensityThreads)
    map_kernel(DensityMatrices<Real> m, const __grid_constant__ QubitMaps<Real, kQubits> maps, int qubit, bool first) {
  constexpr int kSide = 1 << kQubits;
  const int64_t states = int64_t{1} << m.qubits, side = states >> kQubits, row = blockIdx.y;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= side * side) return;
  const auto spread = [&](int64_t i) {
    const int64_t low = i & ((int64_t{1} << qubit) - 1);
    return ((i - low) << kQubits) + low;
  };
  const int64_t r = spread(group / side), c = spread(group % side);
  const Real* amplitudes = m.amplitudes + row * states;
  Real* re = m.re + row * states * states;
  Real* im = m.im ? m.im + row * states * states : nullptr;
  Real x[kSide][kSide], y[kSide][kSide];
#pragma unroll
  for (int a = 0; a < kSide; ++a) {
#pragma unroll
    for (int b = 0; b < kSide; ++b) {
      const int64_t from_row = r + (int64_t{a} << qubit), from_column = c + (int64_t{b} << qubit);
      x[a][b] = first ? amplitudes[from_row] * amplitudes[from_column] : re[from_row * states + from_column];
      y[a][b] = first || !im ? Real{0} : im[from_row * states + from_column];
    }
  }
#pragma unroll
  for (int k = 0; k < kQubits; ++k) {
    const QubitMap<Real>& map = maps.qubit[k];
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        if ((a >> k & 1) || (b >> k & 1)) continue;
        Real block_re[4], block_im[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          block_re[i] = x[a | (i >> 1) << k][b | (i & 1) << k], block_im[i] = y[a | (i >> 1) << k][b | (i & 1) << k];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Real to_re = 0, to_im = 0;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            to_re += map.re[i][j] * block_re[j];
            if (!im) continue;
            to_re -= map.im[i][j] * block_im[j];
            to_im += map.re[i][j] * block_im[j] + map.im[i][j] * block_re[j];
          }
          x[a | (i >> 1) << k][b | (i & 1) << k] = to_re, y[a | (i >> 1) << k][b | (i & 1) << k] = to_im;
        }
      }
    }
  }
#pragma unroll
  for (int a = 0; a < kSide; ++a) {
#pragma unroll
    for (int b = 0; b < kSide; ++b) {
      const int64_t at = (r + (int64_t{a} << qubit)) * states + c + (int64_t{b} << qubit);
      re[at] = x[a][b];
      if (im) im[at] = y[a][b];
    }
  }
}

template <class Real>
struct FormTile {
  // Lines end in a gap, so that what is written down a column goes to different banks.
  using Plane = Real[kFormDepth][kFormEdge + 1];
  Plane rho_re, rho_im, u_re, u_im;
};

// found_i = sum over r, c of u_ir rho_rc conj(u_ic), for kFormEdge states i of a row. The mirror image of an element adds
// the same, so only columns up to the end of the tile's own rows are read.
template <class Real, bool kComplex>
__global__ void __launch_bounds__(kDensityThreads) forms_kernel(DensityMatrices<Real> m) {
  static_assert(kDensityThreads == kFormEdge / kFormEach * kFormEdge / kFormEach);
  FormTile<Real>& tile = *dynamic_shared<FormTile<Real>>();
  const int64_t states = int64_t{1} << m.qubits, row = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kFormEdge;
  const Real* re = m.re + row * states * states;
  const Real* im = kComplex ? m.im + row * states * states : nullptr;
  // Edges of a thread's share lie kFormEdge / kFormEach apart: its warp reads neighbours.
  const int across = static_cast<int>(threadIdx.x) % (kFormEdge / kFormEach),
            down = static_cast<int>(threadIdx.x) / (kFormEdge / kFormEach);
  Real sum[kFormEach] = {};
  for (int64_t r = 0; r < states; r += kFormEdge) {
    Real z_re[kFormEach][kFormEach] = {}, z_im[kFormEach][kFormEach] = {};  // of state, row
    for (int64_t c = 0; c < r + kFormEdge && c < states; c += kFormDepth) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kFormDepth * kFormEdge; i += kDensityThreads) {
        const int step = i % kFormDepth, line = i / kFormDepth;
        const bool in_rho = r + line < states && c + step < states, in_u = first + line < states && c + step < states;
        const int64_t of_rho = (r + line) * states + c + step, of_u = 2 * ((first + line) * states + c + step);
        tile.rho_re[step][line] = in_rho ? re[of_rho] : Real{0};
        if (kComplex) tile.rho_im[step][line] = in_rho ? im[of_rho] : Real{0};
        tile.u_re[step][line] = in_u ? m.unitary[of_u] : Real{0};
        tile.u_im[step][line] = in_u ? m.unitary[of_u + 1] : Real{0};
      }
      __syncthreads();
      if (c == r) {
#pragma unroll
        for (int i = 0; i < kFormEach; ++i) {
#pragma unroll
          for (int j = 0; j < kFormEach; ++j) z_re[i][j] *= 2, z_im[i][j] *= 2;
        }
      }
#pragma unroll 4
      for (int step = 0; step < kFormDepth; ++step) {
        Real x[kFormEach], y[kFormEach], a[kFormEach], b[kFormEach];
#pragma unroll
        for (int i = 0; i < kFormEach; ++i) {
          x[i] = tile.rho_re[step][across + i * (kFormEdge / kFormEach)];
          y[i] = kComplex ? tile.rho_im[step][across + i * (kFormEdge / kFormEach)] : Real{0};
          a[i] = tile.u_re[step][down + i * (kFormEdge / kFormEach)],
          b[i] = tile.u_im[step][down + i * (kFormEdge / kFormEach)];
        }
#pragma unroll
        for (int i = 0; i < kFormEach; ++i) {
#pragma unroll
          for (int j = 0; j < kFormEach; ++j) {
            z_re[i][j] += x[j] * a[i];
            z_im[i][j] -= x[j] * b[i];
            if (kComplex) {
              z_re[i][j] += y[j] * b[i];
              z_im[i][j] += y[j] * a[i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFormEach; ++i) {
#pragma unroll
      for (int j = 0; j < kFormEach; ++j) {
        const int64_t state = first + down + i * (kFormEdge / kFormEach), column = r + across + j * (kFormEdge / kFormEach);
        if (state >= states || column >= states) continue;
        const Real* u = m.unitary + 2 * (state * states + column);
        sum[i] += u[0] * z_re[i][j] - u[1] * z_im[i][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFormEach; ++i) {
    for (int step = kFormEdge / kFormEach / 2; step > 0; step /= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], step);
    const int64_t state = first + down + i * (kFormEdge / kFormEach);
    // Rounding may leave a probability of 0 below it.
    if (across == 0 && state < states) m.found[row * states + state] = sum[i] < 0 ? Real{0} : sum[i];
  }
}

}  // namespace cuda
}  // namespace qexport
