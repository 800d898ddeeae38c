// Peaks of this machine, and the parts of the kernels by themselves, on one core and on data that lies in its
// cache.
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "blocked_exact.h"
#include "exact_block.h"
#include "harness.h"
#include "peaks.h"
#include "tile_permission.h"
#include "train_groups.h"
#include "tree_cluster.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

using Floats = std::unique_ptr<float[], decltype(&std::free)>;

// n floats in [-1, 1), aligned to a vector; the same every time.
Floats floats(int64_t n) {
  Floats data(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(n * 4 + 63) / 64 * 64)), std::free);
  uint32_t state = 1;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = static_cast<float>(static_cast<int32_t>(state)) * 4.65661287e-10f;
  }
  return data;
}

constexpr int kVecs = kMaxRows / kLanes;
constexpr double kPairs = static_cast<double>(kTile * kMaxRows);  // (query, key) of a tile of keys and a block of queries

void title(char (&name)[64], const char* what, const char* precision, int64_t d) {
  std::snprintf(name, sizeof name, "%s, %s, d = %d", what, precision, static_cast<int>(d));
}

// The products of exact_block.h, on keys and values as they lie.
void dense_products(int64_t d) {
  const Floats k = floats(kTile * d), q = floats(d * kMaxRows), s = floats(kTile * kMaxRows), o = floats(d * kMaxRows);
  const Floats p = floats(kTile * kMaxRows), rescale = floats(kMaxRows);
  char name[64];
  title(name, "scores q k", "rows of fp32", d);
  micro::measure(name, "pair", kPairs, [&] {
    score_product(k.get(), d, q.get(), s.get(), kMaxRows, d, kTile, kVecs);
    micro::keep(s.get());
  });
  title(name, "values p v", "rows of fp32", d);
  micro::measure(name, "pair", kPairs, [&] {
    value_product(k.get(), d, p.get(), o.get(), kMaxRows, d, kTile, kVecs, rescale.get());
    micro::keep(o.get());
  });
}

// Packing, products and softmax over blocks of 16 keys.
void blocks(Precision precision, const char* word, int64_t d) {
  const Floats k = floats(kTile * d), q = floats(d * kMaxRows), s = floats(kTile * kMaxRows), p = floats(kTile * kMaxRows);
  const Floats o = floats(d * kMaxRows), scale = floats(kMaxRows), raw = floats(kTile * kMaxRows);
  AttentionJob job{};
  job.params.type = DType::f32;
  job.params.kv_heads = 1;
  job.total_len = kTile;
  job.tensors.k = job.tensors.v = {k.get(), 0, 0, d};
  job.blocks = block_layout(precision, kTiles, kTile, d, d);
  const Floats memory = floats(static_cast<int64_t>(job.blocks.bytes_per_head() / sizeof(float)));
  job.blocks.keys = memory.get();
  job.blocks.values = memory.get() + job.blocks.stored * job.blocks.key_block;
  job.blocks.key_mean = job.blocks.values + job.blocks.stored * job.blocks.value_block;
  if (precision == Precision::int8) key_mean(job, 0, 0);
  int32_t list[kTile / kBlockKeys];
  for (int32_t i = 0; i < kTile / kBlockKeys; ++i) list[i] = i;
  alignas(64) float m[kMaxRows] = {}, l[kMaxRows] = {}, alpha[kMaxRows];
  const TileRegisters registers;

  char name[64];
  title(name, "packing", word, d);
  micro::measure(name, "key", kTile, [&] {
    pack_blocks(job, 0, 0, 0, job.blocks.count);
    micro::keep(memory.get());
  });
  title(name, "scores q k", word, d);
  pack_block_queries(job.blocks, q.get(), kMaxRows, kVecs, scale.get());
  micro::measure(name, "pair", kPairs, [&] {
    score_blocks(job.blocks, job.blocks.keys, list, job.blocks.count, q.get(), scale.get(), s.get(), kMaxRows, kVecs);
    micro::keep(s.get());
  });
  title(name, "softmax", word, d);
  micro::measure(name, "pair", kPairs, [&] {
    exp2_scores(precision, raw.get(), kMaxRows, kTile, kVecs, m, l, alpha, p.get());
    micro::keep(p.get());
  });
  title(name, "scores and softmax", word, d);
  bool moved;
  for (float& x : m) x = 100.0f;  // above all scores
  micro::measure(name, "pair", kPairs, [&] {
    exp2_score_blocks(job.blocks, job.blocks.keys, list, job.blocks.count, q.get(), scale.get(), kMaxRows, kVecs, m, l,
                      alpha, p.get(), moved);
    micro::keep(p.get());
  });
  title(name, "values p v", word, d);
  micro::measure(name, "pair", kPairs, [&] {
    value_blocks(job.blocks, job.blocks.values, list, job.blocks.count, p.get(), o.get(), kMaxRows, kVecs, nullptr);
    micro::keep(o.get());
  });
}

// The tree over the keys of one head.
void clustering(int64_t keys, int64_t d) {
  const int64_t stride = packed_row(d);
  const Floats points = floats(keys * stride);
  Arena size{nullptr, 0};
  cluster_scratch(size, keys, stride);
  const Floats memory = floats(static_cast<int64_t>(size.used / sizeof(float)) + 16);
  Arena arena{reinterpret_cast<char*>(memory.get()), 0};
  const ClusterScratch scratch = cluster_scratch(arena, keys, stride);
  std::vector<int32_t> list(static_cast<size_t>(keys));
  char name[64];
  std::snprintf(name, sizeof name, "clustering, %d keys, d = %d", static_cast<int>(keys), static_cast<int>(d));
  micro::measure(name, "key", static_cast<double>(keys), [&] {
    for (int64_t i = 0; i < keys; ++i) list[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    cluster({points.get(), stride}, list.data(), keys, scratch);
    micro::keep(list.data());
  });
}

// What the estimates of qexport/mps/cost.py are made of: a block takes 8 steps beside its own time, a call a block.
void train_products() {
  constexpr int64_t kWidth = Wide<float>::panel, kDeep = 512, kRows = 64, kBlocks = 64;
  const Floats a = floats(kRows * kDeep), rhs = floats(kDeep * kWidth), c = floats(kRows * kBlocks * kWidth);
  const auto product = [&](int64_t depth, int64_t rows, int64_t width) {
    multiply(a.get(), depth, int64_t{1}, rhs.get(), width, c.get(), width, depth, rows, width);
    micro::keep(c.get());
  };
  micro::measure("train product", "step", kRows * kDeep, [&] { product(kDeep, kRows, kWidth); });
  micro::measure("train product", "block", kBlocks, [&] { product(1, 8, kBlocks * kWidth); });
  micro::measure("train product", "call", 1, [&] { product(1, 1, kWidth); });
}

}  // namespace

void run() {
  peaks();
  train_products();
  for (const int64_t d : {64, 32}) {
    for (const int64_t keys : {512, 4096}) clustering(keys, d);
    dense_products(d);
    blocks(Precision::fp32, "fp32", d);
#if defined(QEXPORT_LOW_PRECISION)
    blocks(Precision::bf16, "bf16", d);
    if (!kTiles) blocks(Precision::int8, "int8", d);
#endif
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport

int main() {
  if (qexport::QEXPORT_ISA::kTiles) qexport::ask_for_tiles();
  qexport::QEXPORT_ISA::run();
}
