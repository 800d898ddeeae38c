// What decoding with strategy tree keeps of a cache of keys and values: the state `key_summary`, float32 of shape
// (batch, kv_heads, summary_chunks, summary_row). It is part of the op's interface; docs/math.md says what it is for.
#pragma once

#include <cstdint>

namespace qexport {

constexpr int64_t kSinkKeys = 16;     // the first keys, which many heads look at all the time, are always read exactly
constexpr int64_t kChunkKeys = 512;   // keys that are clustered together, once all of them are there
constexpr int64_t kClusterKeys = 16;  // keys of a cluster
constexpr int64_t kChunkClusters = kChunkKeys / kClusterKeys;

// Whole chunks among `len` keys: chunk c holds the keys from kSinkKeys + c * kChunkKeys on.
inline int64_t summary_chunks(int64_t len) { return len < kSinkKeys ? 0 : (len - kSinkKeys) / kChunkKeys; }

// Floats of a chunk: those of ChunkSummary.
inline int64_t summary_row(int64_t head_size, int64_t v_head_size) {
  return kChunkClusters * (head_size + v_head_size + 4 + kClusterKeys);
}

// The parts of one chunk's row.
struct ChunkSummary {
  float* mean_key;      // (kChunkClusters, head_size)
  float* mean_value;    // (kChunkClusters, v_head_size)
  float* keys;          // (kChunkClusters): kClusterKeys, or 0 where the chunk has not been summarised
  float* key_spread;    // (kChunkClusters): mean |k - mean_key|^2
  float* value_spread;  // (kChunkClusters): mean |v - mean_value|^2
  float* value_norm;    // (kChunkClusters): mean |v|^2
  float* members;       // (kChunkClusters, kClusterKeys): places in the chunk, 0 to kChunkKeys - 1

  ChunkSummary(float* row, int64_t head_size, int64_t v_head_size) {
    mean_key = row;
    mean_value = mean_key + kChunkClusters * head_size;
    keys = mean_value + kChunkClusters * v_head_size;
    key_spread = keys + kChunkClusters;
    value_spread = key_spread + kChunkClusters;
    value_norm = value_spread + kChunkClusters;
    members = value_norm + kChunkClusters;
  }
};

}  // namespace qexport
