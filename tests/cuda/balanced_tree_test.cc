// The order of balanced_tree against the definition in float64 (docs/math.md, "tree", "Clusters"), without a GPU.
#include "balanced_tree.cuh"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

using namespace qexport;
using namespace qexport::cuda;

namespace {

using Row = std::vector<double>;

void divide(const std::vector<Row>& x, std::vector<int32_t> rows, int64_t cluster, std::vector<int32_t>& order) {
  const int64_t n = static_cast<int64_t>(rows.size());
  if (n <= cluster) return void(order.insert(order.end(), rows.begin(), rows.end()));
  const size_t d = x[0].size();
  std::vector<Row> some;
  for (int64_t i = 0; i < std::min<int64_t>(n, 256); ++i) some.push_back(x[rows[n > 256 ? i * n / 256 : i]]);
  Row mean(d), square(d), u(d), next(d);
  for (const Row& row : some) {
    for (size_t c = 0; c < d; ++c) mean[c] += row[c] / some.size();
  }
  for (Row& row : some) {
    for (size_t c = 0; c < d; ++c) row[c] -= mean[c], square[c] += row[c] * row[c];
  }
  u[std::max_element(square.begin(), square.end()) - square.begin()] = 1;
  for (int step = 0; step < 3; ++step) {
    std::fill(next.begin(), next.end(), 0.0);
    for (const Row& row : some) {
      const double t = std::inner_product(row.begin(), row.end(), u.begin(), 0.0);
      for (size_t c = 0; c < d; ++c) next[c] += t * row[c];
    }
    const double norm = std::sqrt(std::inner_product(next.begin(), next.end(), next.begin(), 0.0));
    for (size_t c = 0; c < d && norm > 0; ++c) u[c] = next[c] / norm;
  }
  const int64_t left = ((n + cluster - 1) / cluster + 1) / 2 * cluster;
  std::vector<int32_t> places(n);
  std::iota(places.begin(), places.end(), 0);
  std::vector<double> t(n);
  for (int64_t i = 0; i < n; ++i) t[i] = std::inner_product(u.begin(), u.end(), x[rows[i]].begin(), 0.0);
  std::stable_sort(places.begin(), places.end(), [&](int a, int b) { return t[a] < t[b]; });
  std::sort(places.begin(), places.begin() + left);
  std::sort(places.begin() + left, places.end());
  std::vector<int32_t> half[2];
  for (int64_t i = 0; i < n; ++i) half[i >= left].push_back(rows[places[i]]);
  for (const auto& side : half) divide(x, side, cluster, order);
}

struct Case {
  const char* name;
  int64_t rows, past, size, cluster, chunk;
  bool padded, masked, ties;
  int64_t batch = 2, heads = 2;
  float offset = 0.0f;  // of every element
};

template <class T>
int check(const Case& c, DType type) {
  const int64_t batch = c.batch, heads = c.heads;
  std::mt19937 random(static_cast<unsigned>(c.rows));
  std::normal_distribution<float> normal;
  const int64_t all = c.past + c.rows;
  // (batch, heads, all, size), the past apart; elements spread unevenly, so that directions are clear
  std::vector<T> past(batch * heads * c.past * c.size), rows(batch * heads * c.rows * c.size);
  std::vector<std::vector<Row>> x(batch * heads, std::vector<Row>(all, Row(c.size)));
  for (int64_t h = 0; h < batch * heads; ++h) {
    for (int64_t j = 0; j < all; ++j) {
      for (int64_t e = 0; e < c.size; ++e) {
        float value = normal(random) * (1.0f + 4.0f / (1.0f + static_cast<float>(e)));
        if (c.ties) value = e == 0 ? static_cast<float>(j % 7) : 0.0f;
        const T stored = from_float<T>(value + c.offset);
        x[h][j][e] = to_float(stored);
        (j < c.past ? past[(h * c.past + j) * c.size + e] : rows[(h * c.rows + j - c.past) * c.size + e]) = stored;
      }
    }
  }
  std::vector<uint8_t> mask(batch * all);
  for (auto& m : mask) m = random() % 4 != 0;
  const std::vector<int64_t> lengths{all - 1, all / 2};

  AttentionJob job{};
  job.params.type = type;
  job.params.batch = batch, job.params.kv_heads = heads, job.params.q_heads = heads;
  job.params.past_len = c.past, job.params.kv_len = c.rows, job.params.head_size = job.params.v_head_size = c.size;
  job.total_len = all, job.group = 1;
  const HeadRows new_rows{rows.data(), heads * c.rows * c.size, c.rows * c.size, c.size};
  const HeadRows past_rows{past.data(), heads * c.past * c.size, c.past * c.size, c.size};
  const bool values = c.rows % 2;
  (values ? job.tensors.v : job.tensors.k) = new_rows;
  (values ? job.tensors.past_value : job.tensors.past_key) = past_rows;
  if (c.padded) job.tensors.nonpad_kv_seqlen = lengths.data();
  if (c.masked) job.tensors.mask = {mask.data(), DType::boolean, all, 0, 0, all};
  const BalancedTree tree{values, c.masked, c.cluster, c.chunk};
  const int64_t places = tree_places(job, tree), chunks = tree_chunks(job, tree);
  std::vector<int32_t> order(batch * heads * places, -7), count(batch * heads * chunks);
  std::vector<char> scratch(balanced_tree_scratch_bytes(job, tree) + 256);
  Status status;
  balanced_tree(status, job, tree, order.data(), count.data(), scratch.data(), nullptr);

  int64_t wrong = 0;
  for (int64_t h = 0; h < batch * heads; ++h) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::vector<int32_t> members, expected;
      for (int64_t j = chunk * c.chunk; j < std::min(all, (chunk + 1) * c.chunk); ++j) {
        const int64_t b = h / heads;
        if ((!c.padded || j < lengths[b]) && (!c.masked || mask[b * all + j])) members.push_back(static_cast<int32_t>(j));
      }
      divide(x[h], members, c.cluster, expected);
      expected.resize(places / chunks, -1);
      wrong += count[h * chunks + chunk] != static_cast<int32_t>(members.size());
      for (int64_t i = 0; i < places / chunks; ++i) {
        wrong += order[h * places + chunk * (places / chunks) + i] != expected[i];
      }
    }
  }
  std::printf("%s: %ld of %ld places differ%s\n", c.name, static_cast<long>(wrong), static_cast<long>(order.size()),
              status.ok() ? "" : status.text);
  return wrong || !status.ok();
}

}  // namespace

int main() {
  constexpr int64_t kAll = int64_t{1} << 40;
  int failed = 0;
  failed += check<float>({"plain", 300, 0, 64, 64, kAll, false, false, false}, DType::f32);
  failed += check<float>({"odd sizes, past", 201, 66, 13, 16, kAll, false, false, false}, DType::f32);
  failed += check<__half>({"half", 1000, 0, 64, 64, kAll, false, false, false}, DType::f16);
  failed += check<__half>({"values of 130 elements", 333, 0, 130, 16, kAll, true, false, false}, DType::f16);
  failed += check<__nv_bfloat16>({"padding and mask", 600, 100, 32, 64, kAll, true, true, false}, DType::bf16);
  failed += check<__half>({"chunks", 700, 0, 8, 64, 512, false, true, false}, DType::f16);
  failed += check<__half>({"ties", 500, 0, 64, 64, kAll, false, false, true}, DType::f16);
  failed += check<__half>({"large node", 4300, 0, 8, 64, kAll, true, false, false}, DType::f16);
  failed += check<__half>({"large node of one head", 4301, 0, 8, 64, kAll, false, false, false, 1, 1}, DType::f16);
  failed += check<__half>({"large nodes of values of 130 elements", 2100, 100, 130, 64, kAll, true, true, false, 2, 1},
                          DType::f16);
  failed += check<float>({"wide rows", 300, 0, 1000, 64, kAll, false, false, false, 1, 1}, DType::f32);
  failed += check<__half>({"ties of large nodes", 3000, 0, 64, 64, kAll, false, false, true, 1, 1}, DType::f16);
  // One block divides what lies below 1024 rows of 64 elements of float16, or 512 of float32.
  for (const int64_t rows : {64, 65, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097}) {
    failed += check<__half>({"about a limit", rows, 0, 64, 64, kAll, false, false, false, 1, 1}, DType::f16);
    failed += check<float>({"about a limit, clusters of 16", rows, 0, 32, 16, kAll, false, false, false, 1, 1}, DType::f32);
  }
  failed += check<__nv_bfloat16>({"chunks of large nodes", 5000, 0, 16, 64, 2048, true, false, false, 2, 1}, DType::bf16);
  failed += check<__half>({"a long mask", 9000, 0, 8, 64, kAll, true, true, false, 2, 1}, DType::f16);
  failed += check<__half>({"many blocks of one node", 70000, 0, 8, 64, kAll, false, false, false, 1, 1}, DType::f16);
  failed += check<float>({"far from 0", 600, 0, 64, 64, kAll, false, false, false, 1, 2, 300.0f}, DType::f32);
  failed += check<float>({"one row", 1, 0, 8, 64, kAll, false, false, false}, DType::f32);
  return failed != 0;
}
