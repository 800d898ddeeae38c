// What decoding with strategy tree keeps of a cache of keys and values: the state `key_summary`, float32 of shape
// (batch, kv_heads, summary_chunks, summary_row). It is part of the op's interface; docs/math.md says what it is for.
#pragma once

#include <cstdint>

#include "qexport/host_device.h"

namespace qexport {

constexpr int64_t kSinkKeys = 16;     // the first keys, which many heads look at all the time, are always read exactly
constexpr int64_t kChunkKeys = 512;   // keys that are clustered together, once all of them are there
constexpr int64_t kClusterKeys = 16;  // keys of a cluster
constexpr int64_t kChunkClusters = kChunkKeys / kClusterKeys;

// Whole chunks among `len` keys: chunk c holds the keys from kSinkKeys + c * kChunkKeys on.
QEXPORT_HOST_DEVICE inline int64_t summary_chunks(int64_t len) {
  return len < kSinkKeys ? 0 : (len - kSinkKeys) / kChunkKeys;
}

// Floats of a chunk.
QEXPORT_HOST_DEVICE inline int64_t summary_row(int64_t head_size, int64_t v_head_size) {
  return kChunkClusters * (head_size + v_head_size + 4 + kClusterKeys);
}

// The summary of one kv head: summary_chunks * summary_row floats, each kind for all clusters in a row, so that a step reads
// long runs. Cluster i belongs to chunk i / kChunkClusters.
struct HeadSummary {
  float* mean_key;      // (clusters, head_size)
  float* mean_value;    // (clusters, v_head_size)
  float* keys;          // (clusters): kClusterKeys, or 0 where the chunk has not been summarised
  float* key_spread;    // (clusters): mean |k - mean_key|^2
  float* value_spread;  // (clusters): mean |v - mean_value|^2
  float* value_norm;    // (clusters): mean |v|^2
  float* members;       // (clusters, kClusterKeys): places in the chunk, 0 to kChunkKeys - 1

  QEXPORT_HOST_DEVICE HeadSummary(float* head, int64_t chunks, int64_t head_size, int64_t v_head_size) {
    const int64_t clusters = chunks * kChunkClusters;
    mean_key = head;
    mean_value = mean_key + clusters * head_size;
    keys = mean_value + clusters * v_head_size;
    key_spread = keys + clusters;
    value_spread = key_spread + clusters;
    value_norm = value_spread + clusters;
    members = value_norm + clusters;
  }
};

}  // namespace qexport
