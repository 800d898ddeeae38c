// Density matrices of noisy registers on CUDA, some rows at a time in scratch: amplitudes, the maps of the channel on two
// qubits at a time, the quadratic forms of the rows of the unitary as tiles of a product, and what the closed form does
// last.
#include <algorithm>

#include "quantum_noise.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kMatrixBytes = size_t{512} << 20;  // of the rows that are worked on at once, if one takes less
constexpr int64_t kMostRows = 65535;                // what a grid takes
constexpr int kPieceBytes = 32000;                  // what a kernel takes as parameters, since CUDA 12.1
constexpr int kTile = 64, kDepth = 16;              // of the product: states and rows of a matrix, and steps
constexpr int kEach = 4;                            // of the tile's edges, a thread's share

// Scratch of `rows` rows at once.
template <class Real>
struct Matrices {
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
    qubits = p.qubits, rows = std::min({p.rows, kMostRows, std::max(fit, int64_t{1})});
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
struct Piece {
  static constexpr int kNumbers = kPieceBytes / static_cast<int>(sizeof(Real));
  Real number[kNumbers];
};
template <class Real>
__global__ void unpack_kernel(const __grid_constant__ Piece<Real> piece, int count, Real* to) {
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
struct Map {
  Real re[4][4], im[4][4];

  explicit Map(const double* map) {
    for (int i = 0; i < 32; ++i) (i % 2 ? im : re)[i / 8][i / 2 % 4] = static_cast<Real>(map[i]);
  }
};
template <class Real, int kQubits>
struct Maps {
  Map<Real> qubit[kQubits];
};

// The maps of kQubits qubits from `qubit` on, on all elements that differ in these bits of their row and column. `first`:
// the matrix is still that of the amplitudes.
template <class Real, int kQubits>
__global__ void __launch_bounds__(kThreads)
    map_kernel(Matrices<Real> m, const __grid_constant__ Maps<Real, kQubits> maps, int qubit, bool first) {
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
    const Map<Real>& map = maps.qubit[k];
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
struct Tile {
  // Lines end in a gap, so that what is written down a column goes to different banks.
  using Plane = Real[kDepth][kTile + 1];
  Plane rho_re, rho_im, u_re, u_im;
};

// found_i = sum over r, c of u_ir rho_rc conj(u_ic), for kTile states i of a row. The mirror image of an element adds the
// same, so only columns up to the end of the tile's own rows are read.
template <class Real, bool kComplex>
__global__ void __launch_bounds__(kThreads) forms_kernel(Matrices<Real> m) {
  static_assert(kThreads == kTile / kEach * kTile / kEach);
  Tile<Real>& tile = *dynamic_shared<Tile<Real>>();
  const int64_t states = int64_t{1} << m.qubits, row = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kTile;
  const Real* re = m.re + row * states * states;
  const Real* im = kComplex ? m.im + row * states * states : nullptr;
  // Edges of a thread's share lie kTile / kEach apart: its warp reads neighbours.
  const int across = static_cast<int>(threadIdx.x) % (kTile / kEach), down = static_cast<int>(threadIdx.x) / (kTile / kEach);
  Real sum[kEach] = {};
  for (int64_t r = 0; r < states; r += kTile) {
    Real z_re[kEach][kEach] = {}, z_im[kEach][kEach] = {};  // of state, row
    for (int64_t c = 0; c < r + kTile && c < states; c += kDepth) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kDepth * kTile; i += kThreads) {
        const int step = i % kDepth, line = i / kDepth;
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
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) z_re[i][j] *= 2, z_im[i][j] *= 2;
        }
      }
#pragma unroll 4
      for (int step = 0; step < kDepth; ++step) {
        Real x[kEach], y[kEach], a[kEach], b[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[i] = tile.rho_re[step][across + i * (kTile / kEach)];
          y[i] = kComplex ? tile.rho_im[step][across + i * (kTile / kEach)] : Real{0};
          a[i] = tile.u_re[step][down + i * (kTile / kEach)], b[i] = tile.u_im[step][down + i * (kTile / kEach)];
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
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
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t state = first + down + i * (kTile / kEach), column = r + across + j * (kTile / kEach);
        if (state >= states || column >= states) continue;
        const Real* u = m.unitary + 2 * (state * states + column);
        sum[i] += u[0] * z_re[i][j] - u[1] * z_im[i][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    for (int step = kTile / kEach / 2; step > 0; step /= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], step);
    const int64_t state = first + down + i * (kTile / kEach);
    // Rounding may leave a probability of 0 below it.
    if (across == 0 && state < states) m.found[row * states + state] = sum[i] < 0 ? Real{0} : sum[i];
  }
}

template <class T, class Real>
void find_amplitudes(Status& status, const QuantumNoiseParams& p, const void* rows, const Matrices<Real>& m, void* stream) {
  launch(status, amplitudes_kernel<T, Real>, static_cast<unsigned>(m.rows), kThreads, 0, stream, static_cast<const T*>(rows),
         p.n, p.qubits, sum_tolerance(p.type), m.amplitudes);
}

template <class Real, int kQubits>
void map_qubits(Status& status, const QuantumNoiseParams& p, int qubit, const Matrices<Real>& m, void* stream) {
  const int64_t groups = int64_t{1} << 2 * (p.qubits - kQubits);
  const dim3 grid(static_cast<unsigned>(ceil_div(groups, int64_t{kThreads})), static_cast<unsigned>(m.rows));
  const double* map = p.maps + 32 * qubit;
  if constexpr (kQubits == 2) {
    const Maps<Real, 2> maps{{Map<Real>(map), Map<Real>(map + 32)}};
    launch(status, map_kernel<Real, 2>, grid, kThreads, 0, stream, m, maps, qubit, qubit == 0);
  } else {
    const Maps<Real, 1> maps{{Map<Real>(map)}};
    launch(status, map_kernel<Real, 1>, grid, kThreads, 0, stream, m, maps, qubit, qubit == 0);
  }
}

template <class Real>
void find_forms(Status& status, const QuantumNoiseParams& p, const Matrices<Real>& m, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{1} << p.qubits, int64_t{kTile})), static_cast<unsigned>(m.rows));
  const auto kernel = p.real_maps ? forms_kernel<Real, false> : forms_kernel<Real, true>;
  launch(status, kernel, grid, kThreads, sizeof(Tile<Real>), stream, m);
}

template <class Real, class Given>
void send(Status& status, const Given* from, int64_t count, Real* to, void* stream) {
  Piece<Real> piece;
  for (int64_t begin = 0; begin < count; begin += Piece<Real>::kNumbers) {
    const int numbers = static_cast<int>(std::min(int64_t{Piece<Real>::kNumbers}, count - begin));
    std::transform(from + begin, from + begin + numbers, piece.number, [](Given x) { return static_cast<Real>(x); });
    launch(status, unpack_kernel<Real>, static_cast<unsigned>(ceil_div(numbers, kThreads)), kThreads, 0, stream, piece,
           numbers, to + begin);
  }
}

}  // namespace

template <class Real>
void density_matrices(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t, const CudaCall& call) {
  Matrices<Real> m;
  m.lay_out(p, call.scratch);
  NoiseJob<Real> last = noise_job<Real>(p, t);
  last.source = m.found, last.source_type = p.type == DType::f64 ? DType::f64 : DType::f32;
  last.width = int64_t{1} << p.qubits;
  last.tolerance = kInfinity;  // rows that were none are NaN
  const int64_t bytes = p.type == DType::f64 ? 8 : p.type == DType::f32 ? 4 : 2;
  const int64_t numbers = int64_t{2} << 2 * p.qubits;
  if (p.unitary_type == DType::f64) {
    send(status, static_cast<const double*>(p.unitary), numbers, m.unitary, call.stream);
  } else {
    send(status, static_cast<const float*>(p.unitary), numbers, m.unitary, call.stream);
  }
  for (int64_t first = 0; first < p.rows; first += m.rows) {
    m.rows = std::min(m.rows, p.rows - first);
    const char* rows = static_cast<const char*>(t.probabilities) + first * p.n * bytes;
    if constexpr (sizeof(Real) == 8) {
      find_amplitudes<double>(status, p, rows, m, call.stream);
    } else if (p.type == DType::f32) {
      find_amplitudes<float>(status, p, rows, m, call.stream);
    } else if (p.type == DType::f16) {
      find_amplitudes<__half>(status, p, rows, m, call.stream);
    } else {
      find_amplitudes<__nv_bfloat16>(status, p, rows, m, call.stream);
    }
    int qubit = p.qubits % 2;
    if (qubit) map_qubits<Real, 1>(status, p, 0, m, call.stream);
    for (; qubit < p.qubits; qubit += 2) map_qubits<Real, 2>(status, p, qubit, m, call.stream);
    find_forms(status, p, m, call.stream);
    last.rows = m.rows;
    last.noisy = static_cast<char*>(t.noisy) + first * p.n * bytes;
    last.leak = t.leak ? static_cast<Real*>(t.leak) + first : nullptr;
    closed_form(status, last, call.stream);
  }
}

template <class Real>
size_t density_scratch_bytes(const QuantumNoiseParams& p) {
  Matrices<Real> m;
  return static_cast<size_t>(m.lay_out(p, nullptr)) * sizeof(Real);
}

template void density_matrices<float>(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t,
                                      const CudaCall& call);
template void density_matrices<double>(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t,
                                       const CudaCall& call);
template size_t density_scratch_bytes<float>(const QuantumNoiseParams& p);
template size_t density_scratch_bytes<double>(const QuantumNoiseParams& p);

}  // namespace cuda
}  // namespace qexport
