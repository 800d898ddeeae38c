// Tiles of flash attention: their shapes, what a thread holds of one, and how rows lie in shared memory.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace qexport {
namespace cuda {

constexpr int kFlashMostJoined = 16;  // queries for each multiprocessor up to which their keys are split
constexpr int kRun = 64;              // rows that are copied at once where they lie at even distances, in elements
template <class T>
struct Run {
  const T* first;
  unsigned stride;  // of 32 bits, since registers are scarce
  int rows;         // that are there, the others are zeros; kUneven: they do not
};
constexpr int kUneven = -(1 << 30);

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
  static constexpr int kRowBytes = kHead * 2;
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

// What a thread holds of a tile: pairs of columns of some rows, not yet divided by the sum of their row.
template <class Tile>
struct FlashState {
  static constexpr int kRows = 2 * Tile::kRowTiles, kPairs = Tile::kHead / 8;
  static constexpr bool kWholePairs = true;  // rows have an even number of elements, and pairs of them lie together
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
// each other fill all banks. With kPanelRows they lie in panels of 64 columns of so many rows, as warpgroups want them.
__device__ __forceinline__ int flash_turn(int head, int row) { return head >= 64 ? row & 7 : row >> 1 & 3; }
__device__ __forceinline__ int flash_offset(int head, int panel_rows, int row, int chunk) {
  const int chunks = head >= 64 ? 8 : 4;  // that are permuted among themselves
  const int lane = (chunk % chunks ^ flash_turn(head, row)) << 4;
  if (panel_rows) return (chunk / chunks * panel_rows + row) * chunks * 16 + lane;
  return row * head * 2 + chunk / chunks * chunks * 16 + lane;
}
template <int kHead, int kPanelRows = 0>
__device__ __forceinline__ int flash_offset(int row, int chunk) {
  return flash_offset(kHead, kPanelRows, row, chunk);
}

// What a lane gives to ldmatrix: chunk 2 k + half of row 16 n + row, as the sum of what is known to the compiler and little
// that is not.
template <int kHead, int kPanelRows>
struct FlashLane {
  static constexpr int kRowBytes = kPanelRows && kHead > 64 ? 128 : 2 * kHead;
  int first, chunk;
  __device__ __forceinline__ FlashLane(int row, int half)
      : first(row * kRowBytes), chunk((half ^ flash_turn(kHead, row)) << 4) {}
  __device__ __forceinline__ int at(int n, int k) const {
    constexpr int kChunks = kHead >= 64 ? 8 : 4;
    return flash_offset<kHead, kPanelRows>(16 * n, 2 * k / kChunks * kChunks) + first + (chunk ^ (2 * k % kChunks << 4));
  }
};

template <class Tile, int kRows, class Row, int kPanelRows = Tile::kWarpgroups ? kRows : 0>
__device__ __forceinline__ void flash_copy_rows(char* shared, int columns, const Row& row_of) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kCopiers / kChunks;
  static_assert(Tile::kCopiers % kChunks == 0);
  const int first = static_cast<int>(threadIdx.x % Tile::kCopiers / kChunks),
            chunk = static_cast<int>(threadIdx.x % kChunks);
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kStep); ++i) {
    const int row = i * kStep + first;
    if (kRows % kStep && row >= kRows) break;
    const typename Tile::T* from = row_of(row);
    const bool valid = from && 8 * chunk < columns;
    cp_async_16(shared + flash_offset<Tile::kHead, kPanelRows>(row, chunk), valid ? from + 8 * chunk : nullptr, valid);
  }
}

// Likewise kRun rows at a time: those that lie at even distances take few instructions, of which a short call has as many as
// it can wait for. `keep(row)` is false for rows that count as zeros.
template <class Tile, int kRows, class RunOf, class RowOf, class Keep, int kPanelRows = Tile::kWarpgroups ? kRows : 0>
__device__ __forceinline__ void flash_copy_runs(char* to, int columns, const RunOf& run_of, const RowOf& row_of,
                                                const Keep& keep) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kCopiers / kChunks;
  constexpr int kRowBytes = FlashLane<Tile::kHead, kPanelRows>::kRowBytes;
  static_assert(kRows % kRun == 0 && kStep % 8 == 0);
  const unsigned first = threadIdx.x % Tile::kCopiers / kChunks, chunk = threadIdx.x % kChunks;
  const bool valid = static_cast<int>(8 * chunk) < columns;
  to += flash_offset<Tile::kHead, kPanelRows>(static_cast<int>(first), static_cast<int>(chunk));
#pragma unroll
  for (int part = 0; part < kRows / kRun; ++part) {
    const Run<typename Tile::T> run = run_of(part);
    char* const place = to + part * (kRun * kRowBytes);
    if (run.rows == kUneven) {
#pragma unroll 1
      for (int row = static_cast<int>(first); row < kRun; row += kStep) {
        const typename Tile::T* from = row_of(part * kRun + row);
        const bool there = valid && from && keep(part * kRun + row);
        cp_async_16(place + (row - static_cast<int>(first)) * kRowBytes, there ? from + 8 * chunk : nullptr, there);
      }
      continue;
    }
    const typename Tile::T* from = run.first + 8 * chunk + uint64_t{first} * run.stride;
#pragma unroll
    for (int i = 0; i < kRun; i += kStep) {
      const int row = i + static_cast<int>(first);
      if (kRun % kStep && row >= kRun) break;
      cp_async_16(place + i * kRowBytes, from, valid && row < run.rows && keep(part * kRun + row));
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
  constexpr int kChunks = Tile::kHead / 8;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kKeys * kChunks; i += Tile::kThreads) {
    uint32_t* words =
        reinterpret_cast<uint32_t*>(values + flash_offset<Tile::kHead, Tile::kKeyPanel>(i / kChunks, i % kChunks));
    if (hidden(i / kChunks)) words[0] = words[1] = words[2] = words[3] = 0;
  }
}

// Negates what this thread has copied of Q.
template <class Tile>
__device__ __forceinline__ void flash_negate(char* queries) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kCopiers / kChunks;
  const int first = static_cast<int>(threadIdx.x % Tile::kCopiers / kChunks),
            chunk = static_cast<int>(threadIdx.x % kChunks);
#pragma unroll 1
  for (int part = 0; part < Tile::kQueries; part += kRun) {
#pragma unroll 1
    for (int row = first; row < kRun; row += kStep) {
      char* const at = queries + flash_offset<Tile::kHead, Tile::kQueryPanel>(part + row, chunk);
      uint32_t* words = reinterpret_cast<uint32_t*>(at);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] ^= 0x80008000u;
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
