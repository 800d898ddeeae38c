// What `tree` keeps of a call on the device (docs/math.md, "tree"): the keys and values in the order of the balanced tree,
// and the summaries of their clusters.
#pragma once

#include "attention.cuh"
#include "balanced_tree.cuh"
#include "flash_tile.cuh"
#include "qexport/philox.h"

namespace qexport {
namespace cuda {

constexpr int kCluster = 64;     // keys: a block of the loop of flash.cuh, or two of float32
constexpr int kTreeRows = 128;   // query rows that share a choice of clusters: one tile of that loop
constexpr int kTreeChunk = 512;  // under a causal mask no cluster reaches over a multiple of this
constexpr int kChunkClusters = kTreeChunk / kCluster;
constexpr int kSlopeParts = 64;  // the slope is taken from about so many clusters, evenly spaced
constexpr int kProbes = 3;       // tiles of a head that are looked at before its budget is settled
constexpr int kTrials = 2;       // tiles of a head that are tried for a tolerance
constexpr int kAuditRows = 128;  // rows of a head that are computed exactly to measure its error
static_assert(kAuditRows <= kTreeRows);
constexpr int kSummaryThreads = 256;
constexpr float kMostHalf = 65504.0f;  // of float16

// What a start of the kernels of tiles computes, and for what. Steps that choose clusters start both: one scores them and
// leaves the output of the centroids, the other adds the keys that are read. The rest starts but one of them.
enum class TreeStep {
  probes,  // the scores of tiles that are looked at, and the norm of what centroids alone give: no keys are read
  trials,  // the output of tiles that are tried, with growing budgets and exactly
  tiles,   // the output
  audits,  // parts of the exact output of some rows: nothing is chosen
  again,   // the output, exactly, of the heads that missed the tolerance: likewise
};
constexpr int kAllClusters = -1;  // as a number of chosen clusters: there is no list, nor an output of centroids

// Summaries of a cluster; those of some clusters lie together, a matrix for each.
enum Summary { kMeanKey, kVariance, kMeanValue, kSummaryMatrices };
// The type of a variance, whose range is beyond that of float16.
template <class T>
using Variance = std::conditional_t<std::is_same<T, float>::value, float, __nv_bfloat16>;

// A tile that shares reads at least and at most so many clusters.
__host__ __device__ __forceinline__ int least_shared(int budget) { return (budget + 3) / 4; }
__host__ __device__ __forceinline__ int most_shared(int budget) { return 4 * budget; }

struct HalfSample;  // tree_residual.cuh

// Passed to kernels by value. "Head" is one (batch, kv head), "place" one (batch, query head).
struct TreeLaunch {
  AttentionJob job;
  HeadSamples samples;
  bool shares;       // the tiles of a batch item share one budget
  bool draws;        // two half-samples for each tile, which correct its output
  int64_t chunks;    // of a head
  int64_t clusters;  // of a head, with and without keys
  int64_t tiles;     // of a place
  int64_t parts;     // of the sum that a slope is: a cluster each, or the clusters of a chunk
  int32_t* order;    // (heads, kCluster * clusters)
  int32_t* count;    // (heads, chunks)
  // (heads, stored, kCluster, size), zeros where there is no key: the clusters; under a causal mask then the keys as they
  // come.
  void *keys, *values;
  // (heads, clusters / summary_rows, kSummaryMatrices, summary_rows, row_bytes), as flash_offset says of rows of row_bytes
  // in panels of panel_rows: as products want them in shared memory. Zeros where there is no cluster or no element.
  // Variances are those of each element of the keys.
  char* summaries;
  int summary_rows, row_bytes, panel_rows;
  int64_t summary_blocks;  // of a head
  float* spread;           // (heads, clusters): mean |v - mean v|^2
  float* slope_parts;      // (heads, parts, head_size, v_head_size)
  void* slopes;            // (heads, 1 or chunks, head_size, v_head_size): cov(k, v) within clusters
  float* score;            // (tiles of a step, clusters): of probes, and where half-samples are drawn
  float* threshold;        // (places): score from which on a cluster is read
  float* probe_norm;       // (places, kProbes)
  int trials;              // budgets that are tried: those of num_samples, doubled, and all clusters
  float* trial_output;     // (places, kTrials, trials, kTreeRows, v_head_size)
  int64_t most_chosen;     // clusters that a tile with a choice may read
  int32_t* chosen;         // (tiles of a step, 1 + most_chosen): their number, and which, in order
  float* centroid_weight;  // (tiles of a step, kTreeRows): log2 of the weight of what a row does not read
  HalfSample* halves;      // (tiles of a step, 2): if `draws`
  int32_t* budget;         // (places): clusters that a tile reads
  int audit_parts;         // of the keys
  float* audit_output;     // (places, audit_parts, kTreeRows, v_head_size), not divided by the sum
  float* stats;            // (items of a step, kTreeRows, 2): maximum of the scores and sum; of audits, and if `draws`
  int32_t* again;          // (places): 1 where the head missed the tolerance

  __host__ __device__ __forceinline__ int64_t heads() const { return job.params.batch * job.params.kv_heads; }
  __host__ __device__ __forceinline__ int64_t places() const { return job.params.batch * job.params.q_heads; }
  __host__ __device__ __forceinline__ int64_t summary_bytes() const {
    return heads() * summary_blocks * kSummaryMatrices * summary_rows * row_bytes;
  }
  // Element x of a summary of cluster c.
  template <class T>
  __device__ __forceinline__ T& summary(int64_t head, int c, Summary which, int x) const {
    const int64_t matrix = (head * summary_blocks + c / summary_rows) * kSummaryMatrices + which;
    char* const rows = summaries + matrix * summary_rows * row_bytes;
    constexpr int kEach = kChunkElements<T>;
    return reinterpret_cast<T*>(rows + flash_offset(row_bytes, panel_rows, c % summary_rows, x / kEach))[x % kEach];
  }
  __host__ __device__ __forceinline__ int64_t stored() const { return (job.params.is_causal ? 2 : 1) * clusters; }
  // Clusters that num_samples buys a tile of a place.
  __device__ __forceinline__ int bought(int64_t place) const {
    const int64_t samples = this->samples.of(place % job.params.q_heads);
    return static_cast<int>(min(ceil_div(samples, int64_t{kCluster}), clusters));
  }
  __device__ __forceinline__ int chunk_clusters() const {
    return job.params.is_causal ? kChunkClusters : static_cast<int>(clusters);
  }
  // Row of a head that is audited, one at random in each of kAuditRows equal parts of its queries (or each of fewer).
  __device__ __forceinline__ int audit_row(int64_t place, int part) const {
    const int64_t rows = min(job.params.q_len, int64_t{kAuditRows}), n = job.params.q_len;
    const int64_t begin = part * n / rows, end = (part + 1) * n / rows;
    const uint64_t seed = seed_of(job);
    const PhiloxBlock random =
        philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                   {{job.params.layer, static_cast<uint32_t>(place), static_cast<uint32_t>(part), 2}});
    return static_cast<int>(begin +
                            static_cast<int64_t>(uint64_t{random.word[0]} * static_cast<uint64_t>(end - begin) >> 32));
  }
  // Keys of cluster c, which fill its first rows.
  __device__ __forceinline__ int cluster_rows(int64_t head, int c) const {
    const int in_chunk = chunk_clusters();
    return max(0, min(count[head * chunks + c / in_chunk] - c % in_chunk * kCluster, kCluster));
  }
  // Tile in the middle of one of kProbes equal parts of a head.
  __device__ __forceinline__ int probe_tile(int probe) const {
    return static_cast<int>(tiles * (2 * probe + 1) / (2 * kProbes));
  }
};

// Fills keys to slopes from order and count; tree_summary.cu.
void summarise_clusters(Status& status, const TreeLaunch& tree, void* stream);

// What is settled between two starts of the kernels of tiles; tree_settle.cu. Thresholds from probes, budgets from trials,
// errors and `again` from audits.
void settle_thresholds(Status& status, const TreeLaunch& tree, void* stream);
void settle_budgets(Status& status, const TreeLaunch& tree, void* stream);
void settle_errors(Status& status, const TreeLaunch& tree, void* stream);

// Adds what half-samples of the clusters that were not read say of them to the output of the tiles of a step;
// tree_residual.cu.
void correct_tiles(Status& status, const TreeLaunch& tree, TreeStep step, int64_t blocks, void* stream);

}  // namespace cuda
}  // namespace qexport
