// Exact attention on tiles against float64, with tiles emulated: for processors that have bfloat16 and no AMX.
#include <cmath>
#include <cstdio>
#include <vector>

#include "blocked_exact.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

struct Shape {
  int64_t rows, keys, size, v_size, left_window;
};

float next_number(uint32_t& state) {  // in [-2, 2)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 9.3132257e-10f;
}

// |y - expected| / |expected| over one head, whose values are positive so that nothing cancels.
double error_of(const Shape& shape) {
  uint32_t state = 1;
  std::vector<float> q(shape.rows * shape.size), k(shape.keys * shape.size), v(shape.keys * shape.v_size),
      y(shape.rows * shape.v_size);
  for (float& x : q) x = next_number(state);
  for (float& x : k) x = next_number(state);
  for (float& x : v) x = next_number(state) + 2.0f;
  AttentionJob job{};
  QuantumAttentionParams& p = job.params;
  p.type = DType::f32, p.precision = Precision::bf16, p.scale = 1.0f / std::sqrt(static_cast<float>(shape.size));
  p.batch = p.q_heads = p.kv_heads = 1;
  p.q_len = shape.rows, p.kv_len = shape.keys, p.head_size = shape.size, p.v_head_size = shape.v_size;
  p.is_causal = false, p.left_window = shape.left_window, p.right_window = -1;
  job.tensors.q = {q.data(), 0, 0, shape.size};
  job.tensors.k = {k.data(), 0, 0, shape.size};
  job.tensors.v = {v.data(), 0, 0, shape.v_size};
  job.tensors.y = y.data(), job.tensors.y_row_stride = shape.v_size;
  job.total_len = shape.keys, job.group = 1;
  job.blocks = block_layout(Precision::bf16, kTiles, shape.keys, shape.size, shape.v_size);
  KvBlocks& blocks = job.blocks;
  const auto lines = [](size_t bytes) { return static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)); };
  blocks.keys = reinterpret_cast<float*>(lines(blocks.bytes_per_head()));
  blocks.values = blocks.keys + blocks.stored * blocks.key_block;
  blocks.key_mean = blocks.values + blocks.stored * blocks.value_block;
  key_mean(job, 0, 0);
  pack_blocks(job, 0, 0, 0, blocks.count);
  Arena counted{nullptr, 0};
  blocked_scratch(job, counted);
  char* scratch = lines(counted.used);
  for (int64_t first = 0; first < shape.rows; first += kMaxRows) {
    blocked_exact_block(job, {0, 0, first, lesser<int64_t>(kMaxRows, shape.rows - first), 0, shape.keys}, scratch);
  }
  std::free(blocks.keys);
  std::free(scratch);
  double off = 0.0, norm = 0.0;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const int64_t begin = shape.left_window < 0 ? 0 : greater<int64_t>(0, r - shape.left_window);
    std::vector<double> mean(static_cast<size_t>(shape.v_size));
    double total = 0.0;
    for (int64_t j = begin; j < shape.keys; ++j) {
      double score = 0.0;
      for (int64_t x = 0; x < shape.size; ++x) score += double{q[r * shape.size + x]} * double{k[j * shape.size + x]};
      const double weight = std::exp(score * static_cast<double>(p.scale));
      total += weight;
      for (int64_t x = 0; x < shape.v_size; ++x) mean[x] += weight * double{v[j * shape.v_size + x]};
    }
    for (int64_t x = 0; x < shape.v_size; ++x) {
      const double expected = total > 0.0 ? mean[x] / total : 0.0;
      off += std::pow(double{y[r * shape.v_size + x]} - expected, 2), norm += expected * expected;
    }
  }
  return std::sqrt(off / norm);
}

}  // namespace

int run() {
  const Shape shapes[] = {{1, 1, 1, 1, -1},      {16, 16, 32, 16, -1},   {24, 17, 17, 33, -1},
                          {40, 130, 64, 40, -1}, {64, 300, 130, 64, -1}, {65, 257, 80, 3, -1},
                          {200, 200, 48, 48, 0}, {200, 230, 64, 64, 37}, {129, 513, 64, 64, -1}};
  int failed = 0;
  for (const Shape& shape : shapes) {
    const double error = error_of(shape);
    const bool good = error < 0.004;  // q, k, v and p are rounded to 9 bits
    std::printf("%s rows %d keys %d sizes %d %d window %d: %.2g\n", good ? "ok  " : "FAIL", static_cast<int>(shape.rows),
                static_cast<int>(shape.keys), static_cast<int>(shape.size), static_cast<int>(shape.v_size),
                static_cast<int>(shape.left_window), error);
    failed += !good;
  }
  return failed;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport

int main() { return qexport::QEXPORT_ISA::run(); }
