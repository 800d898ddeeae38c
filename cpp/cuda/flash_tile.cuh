// Tiles of flash attention: their shapes, what a thread holds of one, and how rows lie in shared memory.
#pragma once

#include <type_traits>

#include "base2.cuh"

namespace qexport {
namespace cuda {

constexpr int kFlashMostJoined = 16;  // queries for each multiprocessor up to which their keys are split
constexpr int kRun = 64;              // rows at most that are copied at once where they lie at even distances, in elements
template <class T>
struct Run {
  const T* first;
  unsigned stride;  // of 32 bits, since registers are scarce
  int rows;         // that are there, the others are zeros; kUneven: rows lie anywhere
};
constexpr int kUneven = -(1 << 30);

constexpr int kChunkBytes = 16;  // that a thread copies at once
template <class T>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(T));

// The shape of a tile. A warp computes 16 * kRowTiles queries and shares what it reads of K and V among them.
template <class T_, int kHead_, int kRowTiles_, int kWarps_, int kKeys_, int kBlocksPerProcessor_, bool kWarpgroups_ = false>
struct FlashTile {
  static constexpr bool kWarpgroups = kWarpgroups_;  // the products are those of warpgroups where they exist
  using T = T_;
  static constexpr int kHead = kHead_, kRowTiles = kRowTiles_, kKeys = kKeys_, kThreads = kWarps_ * kWarp;
  static constexpr bool kPipeline = false;
  static constexpr int kSplits = 1;          // warps that share their queries
  static constexpr int kCopiers = kThreads;  // threads that copy rows
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  // Blocks that the keys of few queries are split into, and up to how many queries, both for each multiprocessor.
  static constexpr int kPartsPerProcessor = 2, kMostJoined = kFlashMostJoined;
  static constexpr int kQueries = 16 * kRowTiles * kWarps_;
  static constexpr int kRowBytes = kHead * static_cast<int>(sizeof(T));
  static constexpr int kQueryPanel = kWarpgroups ? kQueries : 0, kKeyPanel = kWarpgroups ? kKeys : 0;
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;  // Q, and two blocks of K and of V
};

// The number of a warp among those that have the queries of a tile.
template <class Tile>
__device__ __forceinline__ int flash_warp() {
  const unsigned warp = threadIdx.x / kWarp;
  return static_cast<int>(Tile::kSplits > 1 ? warp % (Tile::kQueries / (16 * Tile::kRowTiles)) : warp);
}

// Products of float32 are those of its two parts (flash_tf32.cuh).
template <class Tile>
constexpr bool kTf32 = std::is_same<typename Tile::T, float>::value;

// What a thread holds of a tile: pairs of columns of some rows, not yet divided by the sum of their row.
template <class Tile>
struct FlashState {
  static constexpr int kRows = 2 * Tile::kRowTiles, kPairs = Tile::kHead / 8;
  static constexpr bool kWholeUnits = true;  // the output is written by put_row
  __host__ __device__ static constexpr bool runs_on(int arch) { return Tile::kWarpgroups ? arch == 900 : arch >= 800; }
  float o[Tile::kRowTiles][kPairs][4];
  float most[kRows];  // of the scores so far; the same on the four lanes of a row
  float sum[kRows];   // of 2^(score - most); a part of it on each of the four lanes, until join_sums

  __device__ __forceinline__ static int row(int i) {
    return (flash_warp<Tile>() * kRows + i) * 8 + static_cast<int>(threadIdx.x % kWarp) / 4;
  }
  __device__ __forceinline__ static int column(int n) { return 8 * n + 2 * static_cast<int>(threadIdx.x % 4); }
  __device__ __forceinline__ float* pair(int i, int n) { return o[i / 2][n] + i % 2 * 2; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      most[i] = -kInf, sum[i] = 0.0f;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) pair(i, n)[0] = pair(i, n)[1] = 0.0f;
    }
  }
  // A row without a maximum is looked at more closely by the loop with roles, which those beyond the tile are not worth.
  template <class Beyond>
  __device__ __forceinline__ void give_up(const Beyond& beyond) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (beyond(row(i))) most[i] = 0.0f;
    }
  }
  __device__ __forceinline__ void join_sums() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 1);
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 2);
    }
  }
};

// Rows of Q, K and V lie in shared memory one behind the other, permuted so that the same 16 bytes of eight rows that follow
// each other fill all banks. With kPanelRows they lie in panels of 128 bytes of so many rows, as warpgroups want them.
__device__ __forceinline__ int flash_turn(int row_bytes, int row) { return row_bytes >= 128 ? row & 7 : row >> 1 & 3; }
__device__ __forceinline__ int flash_offset(int row_bytes, int panel_rows, int row, int chunk) {
  const int chunks = row_bytes >= 128 ? 8 : 4;  // that are permuted among themselves
  const int lane = (chunk % chunks ^ flash_turn(row_bytes, row)) * kChunkBytes;
  if (panel_rows) return (chunk / chunks * panel_rows + row) * chunks * kChunkBytes + lane;
  return row * row_bytes + chunk / chunks * chunks * kChunkBytes + lane;
}
template <int kRowBytes, int kPanelRows = 0>
__device__ __forceinline__ int flash_offset(int row, int chunk) {
  return flash_offset(kRowBytes, kPanelRows, row, chunk);
}

// What a lane gives to ldmatrix: chunk 2 k + half of row 16 n + row, as the sum of what is known to the compiler and little
// that is not.
template <int kRowBytes, int kPanelRows>
struct FlashLane {
  static constexpr int kRowStep = kPanelRows && kRowBytes > 128 ? 128 : kRowBytes;
  int first, chunk;
  __device__ __forceinline__ FlashLane(int row, int half)
      : first(row * kRowStep), chunk((half ^ flash_turn(kRowBytes, row)) * kChunkBytes) {}
  __device__ __forceinline__ int at(int n, int k) const {
    constexpr int kChunks = kRowBytes >= 128 ? 8 : 4;
    return flash_offset<kRowBytes, kPanelRows>(16 * n, 2 * k / kChunks * kChunks) + first +
           (chunk ^ 2 * k % kChunks * kChunkBytes);
  }
};

template <class Tile, int kRows, class Row, int kPanelRows = Tile::kWarpgroups ? kRows : 0>
__device__ __forceinline__ void flash_copy_rows(char* shared, int columns, const Row& row_of) {
  constexpr int kChunks = Tile::kRowBytes / kChunkBytes, kStep = Tile::kCopiers / kChunks;
  static_assert(Tile::kCopiers % kChunks == 0);
  const int first = static_cast<int>(threadIdx.x % Tile::kCopiers / kChunks),
            chunk = static_cast<int>(threadIdx.x % kChunks), column = chunk * kChunkElements<typename Tile::T>;
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kStep); ++i) {
    const int row = i * kStep + first;
    if (kRows % kStep && row >= kRows) break;
    const typename Tile::T* from = row_of(row);
    const bool valid = from && column < columns;
    cp_async_16(shared + flash_offset<Tile::kRowBytes, kPanelRows>(row, chunk), valid ? from + column : nullptr, valid);
  }
}

// Likewise kRun rows at a time: those that lie at even distances take few instructions, of which a short call has as many as
// it can wait for. `keep(row)` is false for rows that count as zeros.
template <class Tile, int kRows, class RunOf, class RowOf, class Keep, int kPanelRows = Tile::kWarpgroups ? kRows : 0>
__device__ __forceinline__ void flash_copy_runs(char* to, int columns, const RunOf& run_of, const RowOf& row_of,
                                                const Keep& keep) {
  constexpr int kChunks = Tile::kRowBytes / kChunkBytes, kStep = Tile::kCopiers / kChunks;
  constexpr int kEach = kRows < kRun ? kRows : kRun;
  static_assert(kRows % kEach == 0);
  const int first = static_cast<int>(threadIdx.x % Tile::kCopiers / kChunks),
            chunk = static_cast<int>(threadIdx.x % kChunks), column = chunk * kChunkElements<typename Tile::T>;
  const bool valid = column < columns;
  const auto place = [&](int row) {  // of a thread's own: it has one permutation of chunks, or two, in turn
    return to + flash_offset<Tile::kRowBytes, kPanelRows>(first + row % 8, chunk) +
           (row - row % 8) * FlashLane<Tile::kRowBytes, kPanelRows>::kRowStep;
  };
#pragma unroll
  for (int part = 0; part < kRows / kEach; ++part) {
    const Run<typename Tile::T> run = run_of(part);
    if (run.rows == kUneven) {
#pragma unroll 1
      for (int i = 0; i + first < kEach; i += kStep) {
        const int row = part * kEach + i + first;
        const typename Tile::T* from = row_of(row);
        const bool there = valid && from && keep(row);
        cp_async_16(place(part * kEach + i), there ? from + column : nullptr, there);
      }
      continue;
    }
    const typename Tile::T* from = run.first + column + static_cast<uint64_t>(first) * run.stride;
#pragma unroll
    for (int i = 0; i < kEach; i += kStep) {
      const int row = i + first;
      if (kEach % kStep && row >= kEach) break;
      cp_async_16(place(part * kEach + i), from, valid && row < run.rows && keep(part * kEach + row));
      from += uint64_t{kStep} * run.stride;
    }
  }
}
struct KeepAll {
  __device__ __forceinline__ bool operator()(int) const { return true; }
};

// Zeros where rows of V lie that no query sees: 0 * NaN is NaN.
template <class Tile, class Hidden>
__device__ __forceinline__ void flash_clear_values(char* values, const Hidden& hidden) {
  constexpr int kChunks = Tile::kRowBytes / kChunkBytes;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kKeys * kChunks; i += Tile::kThreads) {
    uint32_t* words =
        reinterpret_cast<uint32_t*>(values + flash_offset<Tile::kRowBytes, Tile::kKeyPanel>(i / kChunks, i % kChunks));
    if (hidden(i / kChunks)) words[0] = words[1] = words[2] = words[3] = 0;
  }
}

// Negates what this thread has copied of Q.
template <class Tile>
__device__ __forceinline__ void flash_negate(char* queries) {
  constexpr int kChunks = Tile::kRowBytes / kChunkBytes, kStep = Tile::kCopiers / kChunks;
  const int first = static_cast<int>(threadIdx.x % Tile::kCopiers / kChunks),
            chunk = static_cast<int>(threadIdx.x % kChunks);
#pragma unroll 1
  for (int part = 0; part < Tile::kQueries; part += kRun) {
#pragma unroll 1
    for (int row = first; row < kRun; row += kStep) {
      char* const at = queries + flash_offset<Tile::kRowBytes, Tile::kQueryPanel>(part + row, chunk);
      uint32_t* words = reinterpret_cast<uint32_t*>(at);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] ^= kTf32<Tile> ? 0x80000000u : 0x80008000u;
    }
  }
}

template <class Tile, class Blocks>
__device__ __forceinline__ void flash_copy_queries(char* to, const Blocks& blocks) {
  flash_copy_runs<Tile, Tile::kQueries>(
      to, blocks.head_size, [&](int part) { return blocks.query_run(part); }, [&](int row) { return blocks.query(row); },
      KeepAll{});
}
template <class Tile, class Blocks>
__device__ __forceinline__ void flash_copy_keys(char* to, int block, const Blocks& blocks) {
  flash_copy_runs<Tile, Tile::kKeys>(
      to, blocks.head_size, [&](int part) { return blocks.key_run(block, part); },
      [&](int row) { return blocks.key(block, row); }, KeepAll{});
}
template <class Tile, class Blocks, class Keep = KeepAll>
__device__ __forceinline__ void flash_copy_values(char* to, int block, const Blocks& blocks, const Keep& keep = {}) {
  flash_copy_runs<Tile, Tile::kKeys>(
      to, blocks.v_head_size, [&](int part) { return blocks.value_run(block, part); },
      [&](int row) { return blocks.value(block, row); }, keep);
}

}  // namespace cuda
}  // namespace qexport
