// Exact attention whose tiles are cut by keys, all or those of the last wave: which are, the scratch that this takes, and
// the output against the definition in float64.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "exact_choice.cuh"

using namespace qexport;
using namespace qexport::cuda;

namespace {

struct Case {
  const char* name;
  int multiprocessors;
  int64_t batch, q_heads, kv_heads, queries, keys, size, v_size;
  TileCut want;
  bool some_heads = false;  // only[] is given, 0 for whole packs and within them
};

const Case kCases[] = {
    {"192 queries", 2, 1, 1, 1, 3 * 192 - 7, 1100, 64, 64, {2, 1, 2, 192}},
    {"192 queries in heads of 128", 2, 1, 1, 1, 3 * 192 - 7, 2000, 128, 120, {2, 1, 2, 192}},
    {"128 queries in heads of 128", 2, 1, 1, 1, 3 * 192 - 7, 1100, 128, 120, {4, 1, 2, 128}},
    {"128 queries", 3, 2, 2, 2, 127, 1600, 48, 64, {3, 1, 3, 127}},
    {"64 queries in heads of 128", 3, 2, 2, 2, 61, 1600, 128, 128, {3, 1, 3, 61}},
    {"packed heads", 3, 2, 8, 2, 30, 1600, 64, 40, {3, 1, 3, 120}},
    {"some packed heads", 3, 2, 8, 2, 30, 1600, 64, 64, {3, 1, 3, 120}, true},
    {"some heads, twice as many parts as multiprocessors", 3, 1, 5, 5, 61, 2400, 64, 64, {3, 2, 3, 61}, true},
    {"all tiles of few queries", 8, 1, 3, 1, 60, 1300, 64, 64, {0, 3, 2, 60}},
    {"all tiles of a step, joined by warps", 8, 2, 4, 2, 1, 900, 64, 56, {0, 4, 4, 2}},
    {"all tiles of a step, joined by blocks", 64, 1, 4, 2, 1, 4500, 64, 136, {0, 2, 64, 2}, true},
    {"all tiles, some with fewer rows", 8, 1, 2, 1, 40, 300, 60, 60, {0, 4, 3, 32}},
    {"as many tiles as multiprocessors", 4, 1, 4, 4, 61, 1100, 64, 64, {4, 0, 1, 61}},
};

using Rows = std::vector<__half>;  // (batch, heads, rows, size)

Rows random_rows(int64_t count, float scale) {
  static std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Rows rows(static_cast<size_t>(count));
  for (__half& x : rows) x = from_float<__half>(scale * normal(random));
  return rows;
}

HeadRows heads_of(const Rows& rows, int64_t heads, int64_t count, int64_t size) {
  return {rows.data(), heads * count * size, count * size, size};
}

// Row `query` of a head.
std::vector<double> definition(const __half* q, const __half* k, const __half* v, const Case& c, double scale) {
  std::vector<double> score(static_cast<size_t>(c.keys)), y(static_cast<size_t>(c.v_size));
  double most = -1e300, sum = 0.0;
  for (int64_t j = 0; j < c.keys; ++j) {
    double x = 0.0;
    for (int64_t e = 0; e < c.size; ++e) x += double{to_float(q[e])} * double{to_float(k[j * c.size + e])};
    most = std::max(most, score[static_cast<size_t>(j)] = x * scale);
  }
  for (int64_t j = 0; j < c.keys; ++j) {
    const double weight = std::exp(score[static_cast<size_t>(j)] - most);
    sum += weight;
    for (int64_t e = 0; e < c.v_size; ++e) y[static_cast<size_t>(e)] += weight * double{to_float(v[j * c.v_size + e])};
  }
  for (double& x : y) x /= sum;
  return y;
}

// What is wrong, or nothing.
std::string fault(const Case& c) {
  setenv("QEXPORT_EMULATED_MULTIPROCESSORS", std::to_string(c.multiprocessors).c_str(), 1);
  const int64_t heads = c.batch * c.q_heads, kv_heads = c.batch * c.kv_heads;
  const Rows q = random_rows(heads * c.queries * c.size, 2.0f), k = random_rows(kv_heads * c.keys * c.size, 1.0f);
  const Rows v = random_rows(kv_heads * c.keys * c.v_size, 1.0f);
  const __half unwritten = from_float<__half>(-77.0f);
  Rows y(static_cast<size_t>(heads * c.queries * c.v_size), unwritten);
  AttentionJob job{};
  QuantumAttentionParams& p = job.params;
  p.type = DType::f16, p.batch = c.batch, p.q_heads = c.q_heads, p.kv_heads = c.kv_heads;
  p.q_len = c.queries, p.kv_len = job.total_len = c.keys, p.head_size = c.size, p.v_head_size = c.v_size;
  p.left_window = p.right_window = -1, p.scale = 1.0f / std::sqrt(static_cast<float>(c.size));
  job.group = c.q_heads / c.kv_heads;
  QuantumAttentionTensors& t = job.tensors;
  t.q = heads_of(q, c.q_heads, c.queries, c.size), t.k = heads_of(k, c.kv_heads, c.keys, c.size);
  t.v = heads_of(v, c.kv_heads, c.keys, c.v_size);
  t.y = y.data(), t.y_row_stride = c.v_size, t.y_head_stride = c.queries * c.v_size;
  t.y_batch_stride = c.q_heads * t.y_head_stride;
  std::vector<int32_t> only(static_cast<size_t>(heads), 1);
  for (int64_t head = 0; head < heads && c.some_heads; ++head)
    only[static_cast<size_t>(head)] = head / 2 % 2 && head % 4 != 2;
  if (c.some_heads) only.back() = 1;

  Status status;
  const Device device = current_device(status);
  TileCut found{};
  choose(job, device, [&](auto choice) { found = cut_of(job, device, choice); });
  const auto numbers = [](const TileCut& cut) { return std::make_tuple(cut.whole, cut.cut, cut.parts, cut.tile_rows); };
  if (numbers(found) != numbers(c.want)) {
    return std::to_string(found.whole) + " tiles of " + std::to_string(found.tile_rows) + " rows and " +
           std::to_string(found.cut) + " in " + std::to_string(found.parts);
  }
  const size_t bytes = exact_attention_scratch_bytes(job);
  const int64_t rows = c.want.cut * c.want.parts * c.want.tile_rows, stats = (2 * rows + 3) / 4 * 4;  // on 16 bytes
  const size_t want = sizeof(float) * static_cast<size_t>(stats + rows * c.v_size);
  if (bytes != want) return std::to_string(bytes) + " bytes of scratch, not " + std::to_string(want);
  std::vector<uint32_t> scratch(bytes / 4 + 256, 0xffffffff);  // NaN, the last ones beyond what the call may use
  exact_attention(status, job, c.some_heads ? only.data() : nullptr, scratch.data(), nullptr);
  if (!status.ok()) return status.text;
  for (size_t i = bytes / 4; i < scratch.size(); ++i) {
    if (scratch[i] != 0xffffffff) return "wrote beyond its scratch";
  }
  double most = 0.0, error = 0.0;
  for (int64_t row = 0; row < heads * c.queries; ++row) {
    const int64_t head = row / c.queries, kv_head = head / job.group;
    const __half* const got = y.data() + row * c.v_size;
    if (!only[static_cast<size_t>(head)]) {
      for (int64_t e = 0; e < c.v_size; ++e) {
        if (to_float(got[e]) != to_float(unwritten)) return "wrote to head " + std::to_string(head);
      }
      continue;
    }
    const auto y_of_row = definition(q.data() + row * c.size, k.data() + kv_head * c.keys * c.size,
                                     v.data() + kv_head * c.keys * c.v_size, c, double{p.scale});
    for (int64_t e = 0; e < c.v_size; ++e) {
      const double x = y_of_row[static_cast<size_t>(e)], off = std::fabs(double{to_float(got[e])} - x);
      most = std::max(most, std::fabs(x)), error = off <= error ? error : off;  // NaN stays
    }
  }
  // Weights and the output have 11 bits.
  return error <= most / 1024 ? "" : "an error of " + std::to_string(error / most) + " of the largest element";
}

}  // namespace

int main() {
  int wrong = 0;
  for (const Case& c : kCases) {
    const std::string what = fault(c);
    if (what.empty()) continue;
    std::printf("%s: %s\n", c.name, what.c_str());
    ++wrong;
  }
  return wrong > 0;
}
