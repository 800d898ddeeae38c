// Decoding with strategy tree from a key_summary (docs/math.md): what its kernels share. The mean keys of all clusters are
// scored, every row chooses clusters, reads their keys and takes the means of the others, and a sample of these tells the
// error.
#pragma once

#include "attention.cuh"
#include "qexport/key_summary.h"

namespace qexport {
namespace cuda {

constexpr int64_t kMostDecodeRows = 12;    // of one kv head
constexpr int64_t kMostSummarySize = 256;  // of a head, in elements: a block of threads keeps its rows
constexpr int kResidualClusters = 16;      // drawn for each row
constexpr uint32_t kDecodeDraw = 3;        // 0 to 2 are draws of tiles
constexpr int kLogKeys = 4;                // log2 of kClusterKeys
constexpr int kMostTried = 4;              // one in so many clusters is the most that a head reads for a tolerance
static_assert(kClusterKeys == 1 << kLogKeys);

// What a row reads: `chosen` clusters of the chunks [first, end), all of whose keys every row of its kv head sees, and all
// keys that it sees outside of these chunks.
struct ReadPlan {
  int32_t first, end, chosen;
  __device__ __forceinline__ int32_t first_cluster() const { return first * static_cast<int32_t>(kChunkClusters); }
  __device__ __forceinline__ int32_t clusters() const { return (end - first) * static_cast<int32_t>(kChunkClusters); }
  __device__ __forceinline__ int32_t first_key() const { return static_cast<int32_t>(kSinkKeys + first * kChunkKeys); }
};

// Passed to kernels by value. Rows are those of all heads, row = place * q_len + query; "place" is one (batch, query head).
struct DecodeLaunch {
  AttentionJob job;
  HeadSamples samples;
  float* summary;               // up to date
  int64_t chunks;               // of the summary of a head
  int64_t least_keys;           // of the longest cache of the batch: with fewer, trying to keep a tolerance does not pay
  int attempt;                  // budgets that were tried before this one
  int parts;                    // blocks of threads that share out what a row reads
  int64_t most_chosen;          // clusters that a row may read
  bool draws;                   // somebody wants to know the error, or the output corrected
  bool keys_wide, values_wide;  // rows of K, of V, and of their means, begin on 16 bytes
  float* weight;                // (rows, clusters): log2 of the mean weight of a key; -inf once the cluster is chosen
  uint32_t* gain_key;           // (rows, clusters): of (what a cluster's means get wrong)^2, up to a factor of the row
  float* size;                  // (rows, clusters): what drawing is in proportion to, 0 where chosen; if `draws`
  int32_t* chosen;              // (rows, most_chosen)
  ReadPlan* plan;               // (rows)
  float* part_stats;            // of RowParts
  float* part_outputs;
  int32_t* done;   // (places): 1 where the tolerance is kept
  int32_t* again;  // (places): 1 where all keys are to be read

  __host__ __device__ __forceinline__ int64_t places() const { return job.params.batch * job.params.q_heads; }
  __host__ __device__ __forceinline__ int64_t rows() const { return places() * job.params.q_len; }
  __host__ __device__ __forceinline__ int64_t clusters() const { return chunks * kChunkClusters; }
  __device__ __forceinline__ HeadSummary head_summary(int64_t head) const {
    const QuantumAttentionParams& p = job.params;
    return {summary + head * chunks * summary_row(p.head_size, p.v_head_size), chunks, p.head_size, p.v_head_size};
  }
  // Number of the (batch, kv head) of a place.
  __device__ __forceinline__ int64_t head_of(int64_t place) const { return place / job.group; }
  // Heads of a group say it of each other while they look, hence volatile.
  __device__ __forceinline__ volatile int32_t& reads_all(int64_t place) const {
    return static_cast<volatile int32_t*>(again)[place];
  }
  __device__ __forceinline__ bool settled(int64_t place) const {
    return job.params.error_tolerance > 0.0f && (reads_all(place) || (attempt > 0 && done[place]));
  }
};

// The key of place `member` of cluster c. The state comes from outside: whatever it holds, no key beyond the chunk is read.
__device__ __forceinline__ int32_t cluster_key(const HeadSummary& summary, int32_t c, int member) {
  const int32_t place = static_cast<int32_t>(summary.members[int64_t{c} * kClusterKeys + member]);
  const int32_t chunk = c / static_cast<int32_t>(kChunkClusters);
  return static_cast<int32_t>(kSinkKeys + chunk * kChunkKeys) + (place & static_cast<int32_t>(kChunkKeys - 1));
}

// Non-negative floats are ordered as their bits are; the largest have the smallest keys.
__device__ __forceinline__ uint32_t gain_key(float gain) { return ~__float_as_uint(gain); }
__device__ __forceinline__ float gain_of(uint32_t key) { return __uint_as_float(~key); }

// log2(e) times the score, by a product of a scaled query.
__device__ __forceinline__ float decode_score(float product, float softcap) {
  return (softcap > 0.0f ? softcap * tanhf(product / softcap) : product) * kLog2E;
}

// Fills weight, gain_key, chosen and plan; tree_decode_choose.cu.
void choose_clusters(Status& status, const DecodeLaunch& decode, void* stream);

// Joins what the parts of each row left, corrects it as `residual` says, writes it out, and settles whether it is good
// enough; tree_decode_residual.cu.
void settle_rows(Status& status, const DecodeLaunch& decode, void* stream);

// present_key_summary from key_summary; summarise.cu. A state for heads beyond kMostSummarySize says that nothing is
// summarised.
void update_summary(Status& status, const AttentionJob& job, void* stream);

// Whether a call decodes, and does so faster than by reading all keys, as far as the host knows; tree_decode.cu.
bool decode_applies(const AttentionJob& job);
void decode_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream);
size_t decode_attention_scratch_bytes(const AttentionJob& job);

}  // namespace cuda
}  // namespace qexport
