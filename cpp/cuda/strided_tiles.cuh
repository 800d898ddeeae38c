// What the kernels of strided products share: the job, and how a tile of it finds its operands and its result.
#pragma once

#include "strided_product.cuh"

namespace qexport {
namespace cuda {

constexpr int kProductThreads = 256;
constexpr int kRunLength = 4;           // neighbouring elements that a thread reads at once
constexpr int64_t kOutside = kNoLimit;  // coordinates of what is no row or column; two of them can be added

// What a kernel knows of an operand beside its strides: along which axis its elements are neighbours, whether runs of them
// are aligned and whole.
struct Access {
  bool along_depth, runs;
};
struct Job {
  Product product;
  Access a, b;
  bool runs_of_c;
  int64_t m, n, k, splits, chunk;  // each part of the depth has `chunk`, the last what is left
  void* partials;                  // (splits, batch, m, n), if there are more than one
};

// Products of float16 and bfloat16 by matrix units, in tiles of 128 x 128 or 64 x 64; strided_mma.cu. From sm_80 on.
void launch_mma(Status& status, const Job& job, bool wide, void* stream);

template <int kSize>
inline dim3 tile_grid(const Job& job) {
  const int64_t tiles = ceil_div<int64_t>(job.m, kSize) * ceil_div<int64_t>(job.n, kSize) * job.product.batch * job.splits;
  return dim3(static_cast<unsigned>(tiles < (1 << 30) ? tiles : 1 << 30));
}

// The work of a block.
struct Tile {
  int64_t first_m, first_n, batch, split, begin, end;  // the last two of the depth
};
template <int kSize>
__device__ __forceinline__ int64_t tile_count(const Job& job) {
  return ceil_div<int64_t>(job.m, kSize) * ceil_div<int64_t>(job.n, kSize) * job.product.batch * job.splits;
}
// Tiles that share columns of B, which is the larger operand as a rule, follow each other.
template <int kSize>
__device__ __forceinline__ Tile tile_at(const Job& job, int64_t index) {
  const int64_t tiles_m = ceil_div<int64_t>(job.m, kSize), tiles_n = ceil_div<int64_t>(job.n, kSize);
  const int64_t rest = quotient(index, tiles_m), next = quotient(rest, tiles_n), split = quotient(next, job.product.batch);
  const int64_t begin = split * job.chunk;
  return {(index - rest * tiles_m) * kSize, (rest - next * tiles_n) * kSize, next - split * job.product.batch, split, begin,
          min(begin + job.chunk, job.k)};
}

// Places of the rows of A and the columns of B of a tile.
template <int kSize>
__device__ __forceinline__ void place_operands(const Job& job, const Tile& tile, Place (*places)[kSize]) {
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kSize; i += kProductThreads) {
    const bool rows = i < kSize;
    const int64_t at = rows ? tile.first_m + i : tile.first_n + i - kSize;
    const bool inside = at < (rows ? job.m : job.n);
    places[i / kSize][i % kSize] =
        inside ? locate(rows ? job.product.a.i : job.product.b.j, at) : Place{0, kOutside, kOutside};
  }
}
// Likewise of the rows and columns of C, or of this split's part of it.
template <int kSize>
__device__ __forceinline__ void place_result(const Job& job, const Tile& tile, Place (*places)[kSize]) {
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kSize; i += kProductThreads) {
    const bool rows = i < kSize;
    const int64_t at = rows ? tile.first_m + i : tile.first_n + i - kSize;
    Place place{0, kOutside, kOutside};
    if (at < (rows ? job.m : job.n)) {
      place = job.splits > 1 ? Place{rows ? at * job.n : at, 0, 0} : locate(rows ? job.product.c.i : job.product.c.j, at);
    }
    places[i / kSize][i % kSize] = place;
  }
}

// Where sums go.
template <class Real>
struct Target {
  DType type;
  char* data;
  const void* bias;
  bool runs;
  int64_t rows, columns;

  __device__ __forceinline__ Target(const Job& job, const Tile& tile) {
    const Strided& c = job.product.c;
    const bool part = job.splits > 1;
    const int64_t origin = part ? (tile.split * job.product.batch + tile.batch) * job.m * job.n : tile.batch * c.batch;
    type = part ? (sizeof(Real) == 8 ? DType::f64 : DType::f32) : c.type;
    data = static_cast<char*>(part ? job.partials : const_cast<void*>(c.data)) + origin * bytes_of(type);
    bias = part ? nullptr : job.product.bias;
    runs = part ? job.n % kRunLength == 0 : job.runs_of_c;
    rows = c.rows, columns = c.columns;
  }

  // Neighbouring sums of a row.
  __device__ __forceinline__ void store(const Place& row, const Place* column, const Real* sums) const {
    if (runs) {
      const Place first = row + column[0];
      if (first.row < rows && first.column < columns) store_run(first.at, sums);
      return;
    }
#pragma unroll
    for (int e = 0; e < kRunLength; ++e) {
      const Place place = row + column[e];
      if (place.row >= rows || place.column >= columns) continue;
      Real sum = sums[e];
      if (bias) {
        Real added;
        read_one(type, bias, place.column, added);
        sum += added;
      }
      write_one(type, data, place.at, sum);
    }
  }

 private:
  __device__ __forceinline__ void store_run(int64_t at, const Real* sums) const {
    if (type == DType::f16) return store_halves<__half>(at, sums);
    if (type == DType::bf16) return store_halves<__nv_bfloat16>(at, sums);
    Quad<Real> four;
    for (int e = 0; e < kRunLength; ++e) four.x[e] = sums[e];
    *reinterpret_cast<Quad<Real>*>(reinterpret_cast<Real*>(data) + at) = four;
  }
  template <class T>
  __device__ __forceinline__ void store_halves(int64_t at, const Real* sums) const {
    struct alignas(8) Four {
      T x[kRunLength];
    } four;
    for (int e = 0; e < kRunLength; ++e) four.x[e] = from_float<T>(static_cast<float>(sums[e]));
    *reinterpret_cast<Four*>(reinterpret_cast<T*>(data) + at) = four;
  }
};

}  // namespace cuda
}  // namespace qexport
