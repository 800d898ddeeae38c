// Products of float16 and bfloat16 tensors, and of float made of them on the way, by matrix units. Every number is the sum
// of two of bfloat16, x = high + low, to 2^-17 of it, and a b = high high + high low + low high: what float16 tensors hold
// is not rounded further, nor out of range on the way. Numbers that are of bfloat16 have no low part.
#include "mma.cuh"
#include "strided_tiles.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kDepth = 32;

// A tile of an operand, high and low: its rows of A or columns of B behind each other, or its depth, as they are in memory.
// 80, 144 and 272 bytes from row to row: eight rows are in different banks.
template <int kSize>
struct Halves {
  static constexpr int kPitchOfDepth = kDepth + 8, kPitchOfOuter = kSize + 8;
  alignas(16) uint16_t part[2][kSize * kPitchOfDepth];  // the larger of both forms
};
template <int kSize>
struct SharedMma {
  union {
    Halves<kSize> operand[2][2];  // by buffer
    float sums[kSize][kSize + 8];
  };
  Place places[2][kSize];
};

// A run as it is in memory, until what is computed meanwhile is done: elements of 16 bits two by two, or one by one.
struct Raw {
  uint32_t x[kRunLength];
};
__device__ __forceinline__ uint32_t read_bits(DType type, const void* data, int64_t at) {
  if (type == DType::f32) return static_cast<const uint32_t*>(data)[at];
  return static_cast<const uint16_t*>(data)[at];
}

// A run whose elements lie apart.
__device__ __forceinline__ Raw scattered(const Strided& s, int64_t origin, const Index& depth_index, int64_t depth,
                                         int64_t depth_step, int64_t end, const Place* outer, int outer_step) {
  Raw raw;
#pragma unroll
  for (int e = 0; e < kRunLength; ++e, depth += depth_step, outer += outer_step) {
    raw.x[e] = 0;
    if (depth >= end) continue;
    const Place at = *outer + locate(depth_index, depth);
    if (at.row < s.rows && at.column < s.columns) raw.x[e] = read_bits(s.type, s.data, origin + at.at);
  }
  return raw;
}

template <int kSize>
struct Reader {
  static constexpr int kRuns = kSize * kDepth / kRunLength / kProductThreads;
  const Strided& s;
  const Access access;
  const Index& depth_index;
  const Place* outer;

  // The run of a thread: where it begins in the tile.
  __device__ __forceinline__ void place(int r, int* at_outer, int* at_depth) const {
    const int run = static_cast<int>(threadIdx.x) + r * kProductThreads;
    *at_outer = access.along_depth ? run / (kDepth / kRunLength) : run % (kSize / kRunLength) * kRunLength;
    *at_depth = access.along_depth ? run % (kDepth / kRunLength) * kRunLength : run / (kSize / kRunLength);
  }

  __device__ __forceinline__ void read(int64_t batch, int64_t depth, int64_t end, Raw (&raw)[kRuns]) const {
    const int64_t origin = batch * s.batch;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      int o, d;
      place(r, &o, &d);
      for (int e = 0; e < kRunLength; ++e) raw[r].x[e] = 0;
      if (access.runs) {
        if (depth + d >= end) continue;
        const Place at = outer[o] + locate(depth_index, depth + d);
        if (at.row >= s.rows || at.column >= s.columns) continue;
        if (s.type == DType::f32) {
          const uint4 four = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(s.data) + origin + at.at);
          raw[r].x[0] = four.x, raw[r].x[1] = four.y, raw[r].x[2] = four.z, raw[r].x[3] = four.w;
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(s.data) + origin + at.at);
          raw[r].x[0] = two.x, raw[r].x[1] = two.y;
        }
        continue;
      }
      const int deep = access.along_depth ? 1 : 0;
      raw[r] = scattered(s, origin, depth_index, depth + d, deep, end, outer + o, 1 - deep);
    }
  }

  __device__ __forceinline__ void keep(const Raw (&raw)[kRuns], Halves<kSize>& tile) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      int o, d;
      place(r, &o, &d);
      const int at = access.along_depth ? o * Halves<kSize>::kPitchOfDepth + d : d * Halves<kSize>::kPitchOfOuter + o;
      uint32_t bits[kRunLength] = {raw[r].x[0], raw[r].x[1], raw[r].x[2], raw[r].x[3]};
      if (s.type != DType::f32 && access.runs) {
        bits[3] = bits[1] >> 16, bits[2] = bits[1] & 0xffffu, bits[1] = bits[0] >> 16, bits[0] &= 0xffffu;
      }
      uint2 high, low;
      if (s.type == DType::bf16) {
        high = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
        *reinterpret_cast<uint2*>(tile.part[0] + at) = high;
        continue;
      }
      float x[kRunLength];
      for (int e = 0; e < kRunLength; ++e) {
        x[e] = s.type == DType::f32 ? __uint_as_float(bits[e])
                                    : to_float(__ushort_as_half(static_cast<unsigned short>(bits[e])));
      }
      high = {pair(x[0], x[1]), pair(x[2], x[3])};
      for (int e = 0; e < kRunLength; ++e) {
        const uint32_t two = e < 2 ? high.x : high.y;
        x[e] -= __uint_as_float(e % 2 ? two & 0xffff0000u : two << 16);
      }
      low = {pair(x[0], x[1]), pair(x[2], x[3])};
      *reinterpret_cast<uint2*>(tile.part[0] + at) = high;
      *reinterpret_cast<uint2*>(tile.part[1] + at) = low;
    }
  }

  static __device__ __forceinline__ uint32_t pair(float a, float b) {
    return uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(a))} | uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(b))}
                                                                        << 16;
  }

  // The 16 x 16 numbers from an outer place and a depth on, as four matrices: of 8 outer places each, then the second half
  // of the depth (`depth_last`), or the other way round.
  __device__ __forceinline__ void fragment(const uint16_t* part, int o, int d, bool depth_last, uint32_t (&r)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int first = lane / 8 % 2 * 8, second = lane / 16 * 8;
    const int outer_part = depth_last ? first : second, depth_part = depth_last ? second : first;
    if (access.along_depth) {
      ldmatrix_x4(r, part + (o + outer_part + lane % 8) * Halves<kSize>::kPitchOfDepth + d + depth_part);
    } else {
      ldmatrix_x4_trans(r, part + (d + depth_part + lane % 8) * Halves<kSize>::kPitchOfOuter + o + outer_part);
    }
  }
};

// Warps compute kSize / 2 rows of kSize / 4 columns each.
template <int kSize>
__global__ void __launch_bounds__(kProductThreads, kSize == 128 ? 1 : 2) strided_mma(const __grid_constant__ Job job) {
  constexpr int kRows = kSize / 32, kPairs = kSize / 64;  // fragments of A, and of B, two of its products at once
  SharedMma<kSize>& shared = *dynamic_shared<SharedMma<kSize>>();
  const Product& p = job.product;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_row = warp / 4 * (kSize / 2), first_column = warp % 4 * (kSize / 4);
  const bool a_low = p.a.type != DType::bf16, b_low = p.b.type != DType::bf16;
  const Reader<kSize> of_a{p.a, job.a, p.a.j, shared.places[0]}, of_b{p.b, job.b, p.b.i, shared.places[1]};
  static_assert(kProductThreads == 8 * kWarp);
  for (int64_t index = blockIdx.x; index < tile_count<kSize>(job); index += gridDim.x) {
    const Tile tile = tile_at<kSize>(job, index);
    __syncthreads();  // the last tile's places have been read
    place_operands<kSize>(job, tile, shared.places);
    __syncthreads();

    float acc[kRows][2 * kPairs][4] = {};
    Raw a[Reader<kSize>::kRuns], b[Reader<kSize>::kRuns];
    // The first round only reads: a second copy of that code would take the compiler as long as all the rest.
    int buffer = 1;
    for (int64_t depth = tile.begin - kDepth; depth < tile.end; depth += kDepth, buffer ^= 1) {
      const bool more = depth + kDepth < tile.end;
      if (more) {
        of_a.read(tile.batch, depth + kDepth, tile.end, a);
        of_b.read(tile.batch, depth + kDepth, tile.end, b);
      }
      if (depth >= tile.begin) {
        const Halves<kSize>&left = shared.operand[buffer][0], &right = shared.operand[buffer][1];
#pragma unroll
        for (int d = 0; d < kDepth; d += 16) {
          uint32_t x[2][kRows][4], y[2][kPairs][4];
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            if (part == 0 || a_low) {
#pragma unroll
              for (int i = 0; i < kRows; ++i) of_a.fragment(left.part[part], first_row + 16 * i, d, true, x[part][i]);
            }
            if (part == 0 || b_low) {
#pragma unroll
              for (int j = 0; j < kPairs; ++j) of_b.fragment(right.part[part], first_column + 16 * j, d, false, y[part][j]);
            }
          }
#pragma unroll
          for (int term = 0; term < 3; ++term) {  // the small ones first
            const int of_x = term == 0, of_y = term == 1;
            if ((of_x && !a_low) || (of_y && !b_low)) continue;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
              for (int j = 0; j < 2 * kPairs; ++j) {
                const uint32_t columns[2] = {y[of_y][j / 2][j % 2 * 2], y[of_y][j / 2][j % 2 * 2 + 1]};
                mma_16816<__nv_bfloat16>(acc[i][j], x[of_x][i], columns);
              }
            }
          }
        }
      }
      if (more) {
        of_a.keep(a, shared.operand[buffer ^ 1][0]);
        of_b.keep(b, shared.operand[buffer ^ 1][1]);
      }
      __syncthreads();
    }

    place_result<kSize>(job, tile, shared.places);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* sums = shared.sums[first_row + 16 * i + 8 * half + lane / 4] + first_column + 8 * j + lane % 4 * 2;
          *reinterpret_cast<float2*>(sums) = make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
        }
      }
    }
    __syncthreads();
    const Target<float> target(job, tile);
    for (int run = static_cast<int>(threadIdx.x); run < kSize * kSize / kRunLength; run += kProductThreads) {
      const int row = run / (kSize / kRunLength), column = run % (kSize / kRunLength) * kRunLength;
      target.store(shared.places[0][row], shared.places[1] + column, shared.sums[row] + column);
    }
  }
}

}  // namespace

void launch_mma(Status& status, const Job& job, bool wide, void* stream) {
  if (wide) {
    launch(status, strided_mma<128>, tile_grid<128>(job), dim3(kProductThreads), sizeof(SharedMma<128>), stream, job);
  } else {
    launch(status, strided_mma<64>, tile_grid<64>(job), dim3(kProductThreads), sizeof(SharedMma<64>), stream, job);
  }
}

}  // namespace cuda
}  // namespace qexport
