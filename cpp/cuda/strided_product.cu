// Products of strided matrices in float or double, in tiles of 128 x 128 or 64 x 64 for 256 threads.
#include <algorithm>

#include "strided_tiles.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kTile = 1024;  // elements of an operand's tile: a run for each thread

template <class Real>
__device__ __forceinline__ void read_run(DType type, const void* data, int64_t at, Real (&x)[kRunLength]);
template <>
__device__ __forceinline__ void read_run<float>(DType type, const void* data, int64_t at, float (&x)[kRunLength]) {
  if (type == DType::f32) {
    const Quad<float> four = *reinterpret_cast<const Quad<float>*>(static_cast<const float*>(data) + at);
    for (int e = 0; e < kRunLength; ++e) x[e] = four.x[e];
    return;
  }
  const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
  const uint32_t bits[kRunLength] = {four.x & 0xffffu, four.x >> 16, four.y & 0xffffu, four.y >> 16};
  for (int e = 0; e < kRunLength; ++e) {
    if (type == DType::f16) {
      x[e] = to_float(__ushort_as_half(static_cast<unsigned short>(bits[e])));
    } else {
      x[e] = __uint_as_float(bits[e] << 16);
    }
  }
}
template <>
__device__ __forceinline__ void read_run<double>(DType, const void* data, int64_t at, double (&x)[kRunLength]) {
  const Quad<double> four = *reinterpret_cast<const Quad<double>*>(static_cast<const double*>(data) + at);
  for (int e = 0; e < kRunLength; ++e) x[e] = four.x[e];
}

// A thread's run of an operand's tile. `outer` are the places of the tile's rows of A, or columns of B.
template <class Real>
__device__ __forceinline__ void read_operand(const Strided& s, const Access& access, int64_t batch, const Index& depth_index,
                                             const Place* outer, int first, int64_t depth, int64_t end,
                                             Real (&x)[kRunLength]) {
  if (access.runs) {
    for (int e = 0; e < kRunLength; ++e) x[e] = Real{0};
    if (depth >= end) return;
    const Place place = outer[first] + locate(depth_index, depth);
    if (place.row < s.rows && place.column < s.columns) read_run<Real>(s.type, s.data, batch * s.batch + place.at, x);
    return;
  }
#pragma unroll
  for (int e = 0; e < kRunLength; ++e) {
    x[e] = Real{0};
    const int64_t at = access.along_depth ? depth + e : depth;
    if (at >= end) continue;
    const Place place = outer[access.along_depth ? first : first + e] + locate(depth_index, at);
    if (place.row < s.rows && place.column < s.columns) read_one(s.type, s.data, batch * s.batch + place.at, x[e]);
  }
}

template <class Real, int kSize>
__device__ __forceinline__ void keep_operand(const Access& access, Real* tile, int row, int first,
                                             const Real (&x)[kRunLength]) {
  constexpr int kPitch = kSize + kRunLength;
  if (access.along_depth) {
    for (int e = 0; e < kRunLength; ++e) tile[(row + e) * kPitch + first] = x[e];
  } else {
    Quad<Real> four;
    for (int e = 0; e < kRunLength; ++e) four.x[e] = x[e];
    *reinterpret_cast<Quad<Real>*>(tile + row * kPitch + first) = four;
  }
}

template <class Real, int kSize>
struct Shared {
  static constexpr int kDepth = kTile / kSize;
  Quad<Real> tiles[2][2][kDepth * (kSize + kRunLength) / kRunLength];
  Place places[2][kSize];  // of the rows of A and the columns of B, then of the rows and columns of C
};

// Blocks per multiprocessor that registers are kept for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kWideBlocks = 1;  // there the compiler spills at 128 registers
#else
constexpr int kWideBlocks = 2;
#endif
template <class Real, int kSize>
constexpr int kBlocks = kSize == 128        ? kWideBlocks
                        : sizeof(Real) == 8 ? 2
                                            : 3;

// Each thread computes kChunks x kChunks blocks of 4 x 4, 64 rows or columns apart.
template <class Real, int kSize>
__global__ void __launch_bounds__(kProductThreads, kBlocks<Real, kSize>) strided_product(const __grid_constant__ Job job) {
  constexpr int kChunks = kSize / 64, kDepth = kTile / kSize, kPitch = kSize + kRunLength;
  Shared<Real, kSize>& shared = *dynamic_shared<Shared<Real, kSize>>();
  const Product& p = job.product;
  const int thread = static_cast<int>(threadIdx.x), column = thread % 16 * kRunLength, row = thread / 16 * kRunLength;
  // Where a thread's run of each operand begins in its tile.
  const int outer_fast = thread % (kSize / kRunLength) * kRunLength, depth_slow = thread / (kSize / kRunLength);
  const int depth_fast = thread % (kDepth / kRunLength) * kRunLength, outer_slow = thread / (kDepth / kRunLength);
  const int a_row = job.a.along_depth ? depth_fast : depth_slow, a_first = job.a.along_depth ? outer_slow : outer_fast;
  const int b_row = job.b.along_depth ? depth_fast : depth_slow, b_first = job.b.along_depth ? outer_slow : outer_fast;
  for (int64_t index = blockIdx.x; index < tile_count<kSize>(job); index += gridDim.x) {
    const Tile tile = tile_at<kSize>(job, index);
    __syncthreads();  // the last tile's places have been read
    place_operands<kSize>(job, tile, shared.places);
    __syncthreads();

    Real acc[kChunks * kRunLength][kChunks * kRunLength] = {};
    Real a[kRunLength], b[kRunLength];
    const auto read = [&](int64_t depth) {
      read_operand<Real>(p.a, job.a, tile.batch, p.a.j, shared.places[0], a_first, depth + a_row, tile.end, a);
      read_operand<Real>(p.b, job.b, tile.batch, p.b.i, shared.places[1], b_first, depth + b_row, tile.end, b);
    };
    const auto keep = [&](int buffer) {
      keep_operand<Real, kSize>(job.a, shared.tiles[buffer][0]->x, a_row, a_first, a);
      keep_operand<Real, kSize>(job.b, shared.tiles[buffer][1]->x, b_row, b_first, b);
    };
    // The first round only reads: a second copy of that code would take the compiler as long as all the rest.
    int buffer = 1;
    for (int64_t depth = tile.begin - kDepth; depth < tile.end; depth += kDepth, buffer ^= 1) {
      const bool more = depth + kDepth < tile.end;
      if (more) read(depth + kDepth);
      const Real *left = shared.tiles[buffer][0]->x + row, *right = shared.tiles[buffer][1]->x + column;
      if (depth >= tile.begin) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          Quad<Real> x[kChunks], y[kChunks];
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            x[c] = *reinterpret_cast<const Quad<Real>*>(left + d * kPitch + c * 64);
            y[c] = *reinterpret_cast<const Quad<Real>*>(right + d * kPitch + c * 64);
          }
#pragma unroll
          for (int i = 0; i < kChunks * kRunLength; ++i) {
#pragma unroll
            for (int j = 0; j < kChunks * kRunLength; ++j)
              acc[i][j] += x[i / kRunLength].x[i % kRunLength] * y[j / kRunLength].x[j % kRunLength];
          }
        }
      }
      if (more) keep(buffer ^ 1);
      __syncthreads();
    }

    place_result<kSize>(job, tile, shared.places);
    __syncthreads();
    const Target<Real> target(job, tile);
#pragma unroll
    for (int i = 0; i < kChunks * kRunLength; ++i) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        target.store(shared.places[0][row + i / kRunLength * 64 + i % kRunLength], shared.places[1] + column + j * 64,
                     acc[i] + j * kRunLength);
      }
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kProductThreads) sum_splits(const __grid_constant__ Job job) {
  const Product& p = job.product;
  const int64_t each = job.m * job.n, total = each * p.batch;
  for (int64_t at = int64_t{blockIdx.x} * kProductThreads + threadIdx.x; at < total;
       at += int64_t{gridDim.x} * kProductThreads) {
    Real sum{0};
    for (int64_t s = 0; s < job.splits; ++s) sum += static_cast<const Real*>(job.partials)[s * total + at];
    const int64_t batch = quotient(at, each), rest = at - batch * each, m = quotient(rest, job.n);
    const Place place = locate(p.c.i, m) + locate(p.c.j, rest - m * job.n);
    if (place.row >= p.c.rows || place.column >= p.c.columns) continue;
    Real bias{0};
    if (p.bias) read_one(p.c.type, p.bias, place.column, bias);
    write_one(p.c.type, const_cast<void*>(p.c.data), batch * p.c.batch + place.at, sum + bias);
  }
}

// Whether 4 elements along an index lie behind each other, aligned, and are all inside the limits or all outside.
bool has_runs(const Strided& s, const Index& along, const Index& other) {
  const Digit& fast = along.digits[0];
  const int64_t bytes = bytes_of(s.type);
  int64_t all = reinterpret_cast<intptr_t>(s.data) / bytes | s.batch;
  if (fast.step != 1 || (fast.size | along.count) % kRunLength || reinterpret_cast<uintptr_t>(s.data) % bytes) return false;
  const bool by_row = s.rows < kNoLimit && fast.row, by_column = s.columns < kNoLimit && fast.column;
  if ((by_row && (fast.row != 1 || s.rows % kRunLength)) || (by_column && (fast.column != 1 || s.columns % kRunLength)))
    return false;
  for (const Index* index : {&along, &other}) {
    for (int d = 0; d < index->digits_used; ++d) {
      const Digit& digit = index->digits[d];
      if (&digit == &fast) continue;
      all |= digit.step | (by_row ? digit.row : 0) | (by_column ? digit.column : 0);
    }
  }
  return all % kRunLength == 0;
}

Access access_of(const Strided& s, const Index& depth, const Index& outer) {
  if (has_runs(s, outer, depth)) return {false, true};
  if (has_runs(s, depth, outer)) return {true, true};
  return {depth.digits[0].step == 1 && outer.digits[0].step != 1, false};
}

template <class Real, int kSize>
void launch_tiles(Status& status, const Job& job, void* stream) {
  launch(status, strided_product<Real, kSize>, tile_grid<kSize>(job), dim3(kProductThreads), sizeof(Shared<Real, kSize>),
         stream, job);
}

template <class Real>
void launch_sum(Status& status, const Job& job, void* stream) {
  const int64_t blocks = ceil_div<int64_t>(job.m * job.n * job.product.batch, kProductThreads);
  launch(status, sum_splits<Real>, dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20))), dim3(kProductThreads), 0,
         stream, job);
}

}  // namespace

Digit digit(int64_t size, int64_t step, int64_t row, int64_t column) {
  return {size, step, row, column, size > 0 ? ~uint64_t{0} / static_cast<uint64_t>(size) : 0};
}
Index index_of(const Digit& only) { return {only.size, 1, {only, {}, {}}}; }
Index index_of(const Digit& fast, const Digit& slow) {
  if (slow.size == 1) return index_of(fast);
  if (fast.size == 1) return index_of(slow);
  return {fast.size * slow.size, 2, {fast, slow, {}}};
}
Index index_of(const Digit& fast, const Digit& middle, const Digit& slow) {
  if (slow.size == 1) return index_of(fast, middle);
  if (middle.size == 1) return index_of(fast, slow);
  if (fast.size == 1) return index_of(middle, slow);
  return {fast.size * middle.size * slow.size, 3, {fast, middle, slow}};
}

// Assumed of an H100: 132 multiprocessors of 455 float operations a nanosecond, half as many in double, of which the inner
// loops reach three quarters and a half; 1000 of a product of float16 numbers by three of their halves; 700 ns from the read
// of a tile to its use; 2.5 us from launch to launch; 3 TB/s.
Tiling choose_tiling(DType type, int64_t batch, int64_t m, int64_t n, int64_t k) {
  constexpr double kMultiprocessors = 132.0, kReadNs = 700.0, kLaunchNs = 2500.0, kBytesPerNs = 3000.0;
  const bool is_double = type == DType::f64, narrow = !is_double && type != DType::f32;
  const double numbers = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(batch);
  const double read = static_cast<double>(k) * static_cast<double>(m + n) * static_cast<double>(batch);
  const double bytes = is_double ? 8.0 : 4.0, traffic = (numbers + read) * bytes / kBytesPerNs;
  Tiling best{};
  for (const bool wide : {false, true}) {
    if (wide && is_double) continue;
    const int64_t size = wide ? 128 : 64, depth = narrow ? 32 : kTile / size;
    const double resident = narrow ? (wide ? 1.0 : 2.0) : wide || is_double ? 2.0 : 3.0;
    const double rate = narrow ? (wide ? 1000.0 : 700.0) : is_double ? 115.0 : wide ? 340.0 : 230.0;
    const double step = 2.0 * static_cast<double>(size * size * depth) / rate;
    const double tiles =
        static_cast<double>(ceil_div(m, size)) * static_cast<double>(ceil_div(n, size)) * static_cast<double>(batch);
    for (int64_t splits = 1; splits <= 64 && (splits == 1 || k >= splits * 64); splits *= 2) {
      const double per = tiles * static_cast<double>(splits) / kMultiprocessors;
      const double together = per > resident ? resident : per < 1.0 ? 1.0 : per;
      const double steps = static_cast<double>(ceil_div(ceil_div(k, splits), depth)) + 1.0;
      const double waves = per > resident ? per / resident : 1.0;
      double time = kLaunchNs + std::max(traffic, waves * steps * std::max(kReadNs, together * step));
      if (splits > 1) time += kLaunchNs + 2.0 * static_cast<double>(splits) * numbers * bytes / kBytesPerNs;
      if (best.splits && time >= best.nanoseconds) continue;
      best = {wide, splits, time, splits > 1 ? splits * batch * m * n : 0};
    }
  }
  return best;
}

void multiply(Status& status, const Product& p, void* partials, void* stream) {
  Job job{p, {}, {}, false, p.c.i.count, p.c.j.count, p.a.j.count, 0, 0, partials};
  if (job.m == 0 || job.n == 0 || p.batch == 0) return;
  const Tiling tiling = choose_tiling(p.type, p.batch, job.m, job.n, job.k);
  job.splits = tiling.splits;
  job.chunk = ceil_div(ceil_div(job.k, job.splits), int64_t{32}) * 32;
  job.a = access_of(p.a, p.a.j, p.a.i), job.b = access_of(p.b, p.b.i, p.b.j);
  job.runs_of_c = !p.bias && has_runs(p.c, p.c.j, p.c.i);
  if (p.type == DType::f64) {
    launch_tiles<double, 64>(status, job, stream);
  } else if (p.type != DType::f32 && current_device(status).capability >= 80) {
    launch_mma(status, job, tiling.wide, stream);
  } else if (tiling.wide) {
    launch_tiles<float, 128>(status, job, stream);
  } else {
    launch_tiles<float, 64>(status, job, stream);
  }
  if (job.splits == 1) return;
  if (p.type == DType::f64) {
    launch_sum<double>(status, job, stream);
  } else {
    launch_sum<float>(status, job, stream);
  }
}

}  // namespace cuda
}  // namespace qexport
