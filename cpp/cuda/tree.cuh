// What `tree` keeps of a call on the device (docs/math.md, "tree"): the keys and values in the order of the balanced tree,
// and the summaries of their clusters.
#pragma once

#include "attention.cuh"
#include "balanced_tree.cuh"

namespace qexport {
namespace cuda {

constexpr int kCluster = 64;     // keys: one block of the loop of flash.cuh
constexpr int kTreeRows = 128;   // query rows that share a choice of clusters: one tile of that loop
constexpr int kTreeChunk = 512;  // under a causal mask no cluster reaches over a multiple of this
constexpr int kChunkClusters = kTreeChunk / kCluster;
constexpr int kSlopeParts = 64;  // the slope is taken from about so many clusters, evenly spaced
constexpr int kProbes = 3;       // tiles of a head that are looked at before its budget is settled
constexpr int kSummaryThreads = 256;

// A tile that shares reads at least and at most so many clusters.
__host__ __device__ __forceinline__ int least_shared(int budget) { return (budget + 3) / 4; }
__host__ __device__ __forceinline__ int most_shared(int budget) { return 4 * budget; }

// Passed to kernels by value. "Head" is one (batch, kv head), "place" one (batch, query head).
struct TreeLaunch {
  AttentionJob job;
  HeadSamples samples;
  bool shares;                  // the tiles of a batch item share one budget
  int64_t chunks;               // of a head
  int64_t clusters;             // of a head, with and without keys
  int64_t tiles;                // of a place
  int64_t parts;                // of the sum that a slope is: a cluster each, or the clusters of a chunk
  int32_t* order;               // (heads, kCluster * clusters)
  int32_t* count;               // (heads, chunks)
  void *keys, *values;          // (heads, kCluster * clusters, size), zeros where there is no key
  void *mean_key, *mean_value;  // (heads, clusters, size)
  __nv_bfloat16* variance;      // (heads, clusters, head_size), of each element of the keys
  float* spread;                // (heads, clusters): mean |v - mean v|^2
  float* slope_parts;           // (heads, parts, head_size, v_head_size)
  void* slopes;                 // (heads, 1 or chunks, head_size, v_head_size): cov(k, v) within clusters
  float* threshold;             // (places): score from which on a cluster is read
  float* probe_score;           // (places, kProbes, clusters)
  float* probe_norm;            // (places, kProbes)

  __host__ __device__ __forceinline__ int64_t heads() const { return job.params.batch * job.params.kv_heads; }
  __host__ __device__ __forceinline__ int64_t places() const { return job.params.batch * job.params.q_heads; }
  __device__ __forceinline__ int chunk_clusters() const {
    return job.params.is_causal ? kChunkClusters : static_cast<int>(clusters);
  }
  // Keys of cluster c, which fill its first rows.
  __device__ __forceinline__ int cluster_rows(int64_t head, int c) const {
    const int in_chunk = chunk_clusters();
    return max(0, min(count[head * chunks + c / in_chunk] - c % in_chunk * kCluster, kCluster));
  }
  // Tile in the middle of one of kProbes equal parts of a head.
  __device__ __forceinline__ int64_t probe_tile(int probe) const { return tiles * (2 * probe + 1) / (2 * kProbes); }
};

// Fills keys to slopes from order and count; tree_summary.cu.
void summarise_clusters(Status& status, const TreeLaunch& launch, void* stream);

}  // namespace cuda
}  // namespace qexport
