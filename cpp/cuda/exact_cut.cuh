// How a call of exact attention is cut into blocks of threads: its queries into tiles, and the keys of some tiles into
// parts.
#pragma once

#include <algorithm>
#include <cmath>

#include "exact_tile.cuh"
#include "join_parts.cuh"

namespace qexport {
namespace cuda {

constexpr int kMostParts = 512;
constexpr int kPartBlocks = 4;  // blocks of keys that a part has at least

// Heads that share K and V share tiles too where one head leaves a tile half empty.
template <class Tile>
int pack_of(const AttentionJob& job) {
  return 2 * job.params.q_len <= Tile::kQueries ? static_cast<int>(job.group) : 1;
}
// Of the heads of a pack.
template <class Tile>
int64_t tiles_of(const AttentionJob& job) {
  return ceil_div<int64_t>(pack_of<Tile>(job) * job.params.q_len, Tile::kQueries);
}
template <class Tile>
int64_t all_tiles(const AttentionJob& job) {
  return tiles_of<Tile>(job) * job.params.batch * (job.params.q_heads / pack_of<Tile>(job));
}

// `whole` tiles with a block of threads each, then `cut` ones with `parts` of them, which share out the keys.
struct TileCut {
  int64_t whole, cut;
  int parts, tile_rows;  // rows that a tile has at most
  int64_t blocks() const { return whole + cut * parts; }
  int64_t part_rows() const { return cut * tile_rows * parts; }  // that are left to be joined
  // Floats of scratch: two numbers for each of those rows, up to a multiple of 16 bytes, then the rows.
  int64_t stats() const { return ceil_div<int64_t>(part_rows(), 2) * 4; }
  int64_t scratch(int64_t columns) const { return stats() + part_rows() * columns; }
};

// The keys that a multiprocessor goes through, one wave of blocks after the other, where it has one block at a time. Parts
// start anew, write rows in float32, and are joined by another kernel: both terms are guesses, each of the 3 us that 256
// keys take in tiles of 192 queries in heads of 64 (1120 us for six waves of 16384 keys on an H200).
constexpr double kPartCost = 256.0, kJoinCost = 256.0;
inline double keys_in_turn(const AttentionJob& job, const Device& device, const TileCut& cut) {
  const double keys = static_cast<double>(job.total_len), processors = device.multiprocessors;
  const double whole = static_cast<double>(cut.whole) / processors;
  if (job.params.is_causal) return keys * std::max(whole, 1.0);  // tiles end one by one, so that a wave need not be full
  if (cut.cut == 0) return keys * std::ceil(whole);
  const double waves = std::ceil(static_cast<double>(cut.cut * cut.parts) / processors);
  return keys * whole + waves * (keys / cut.parts + kPartCost) + kJoinCost;
}

// Tiles with roles, of which a multiprocessor has one at a time: those that are over after all full waves are cut where that
// is sooner, into parts that fill the multiprocessors once, or twice where once would be one for each. Tiles that see
// different keys end one by one anyway. Other tiles: all are cut where there are fewer than multiprocessors. With a block of
// threads to join each row, as it was then, many rows lost more than they gained (1024 queries of 8 heads on an H200: 24 us,
// cut 54).
template <class Tile>
TileCut cut_of(const AttentionJob& job, const Device& device) {
  const QuantumAttentionParams& p = job.params;
  const int64_t tiles = all_tiles<Tile>(job), processors = device.multiprocessors;
  const int64_t tile_rows = std::min<int64_t>(Tile::kQueries, pack_of<Tile>(job) * p.q_len);
  const TileCut uncut{tiles, 0, 1, static_cast<int>(tile_rows)};
  int64_t over = tiles, room = 1;
  if constexpr (Tile::kPipeline) {
    over = tiles % processors;
    if (over == 0 || p.is_causal || p.left_window >= 0 || p.right_window >= 0 || job.tensors.nonpad_kv_seqlen) return uncut;
    room = std::min<int64_t>((2 * over <= processors ? 1 : 2) * processors / over, kWarpParts);
  } else {
    const bool many = p.batch * p.q_heads * p.q_len > Tile::kMostJoined * processors;
    if (tiles == 0 || tiles >= processors || many) return uncut;
    room = std::min<int64_t>(Tile::kPartsPerProcessor * processors / tiles, kMostParts);
  }
  const int64_t parts = std::min(room, ceil_div<int64_t>(job.total_len, kPartBlocks * Tile::kKeys));
  if (parts < 2) return uncut;
  const TileCut cut{tiles - over, over, static_cast<int>(parts), uncut.tile_rows};
  return Tile::kPipeline && keys_in_turn(job, device, cut) >= keys_in_turn(job, device, uncut) ? uncut : cut;
}

}  // namespace cuda
}  // namespace qexport
