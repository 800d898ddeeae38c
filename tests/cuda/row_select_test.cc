// No draw of `naive` falls behind the row, where keys of weight are what other rows have there, even if the row has none.
#include "row_select.cuh"

#include <cstdio>
#include <vector>

using namespace qexport;
using namespace qexport::cuda;

namespace {

constexpr int kKeys = 40, kSamples = 50, kBehind = 200;

__global__ void draw_kernel(float* scores, const float* norm, uint32_t* prefix, int32_t* drawn) {
  Row row{};
  row.e = scores, row.n = kKeys, row.norm = norm;
  exponentiate(row, false);
  if (lane_id() == 0) drawn[kKeys + kBehind] = row.rest > 0.0f;
  multinomial(row, kSamples, true, 7, {}, prefix, [&](int i, float) {
    if (lane_id() == 0) ++drawn[i];
  });
}

// Two keys alone have a norm, `score` below the others: how often the first lane draws each key; last, whether the row has a
// sum.
std::vector<int32_t> draws(float score) {
  std::vector<float> scores(kKeys + kBehind, 1.0f), norm(kKeys + kBehind, 1.0f);
  for (int i = 0; i < kKeys; ++i) scores[i] = i < 2 ? score : 0.0f, norm[i] = i < 2 ? 1e12f : 0.0f;
  std::vector<uint32_t> prefix(4);
  std::vector<int32_t> drawn(kKeys + kBehind + 1);
  Status status;
  launch(status, draw_kernel, dim3(1), dim3(kWarp), 0, nullptr, scores.data(), norm.data(), prefix.data(), drawn.data());
  return drawn;
}

}  // namespace

int main() {
  bool good = true;
  // e^-103.5 is the smallest float32, which its share of the sum is below.
  for (const float score : {-10.0f, -103.5f}) {
    const std::vector<int32_t> drawn = draws(score);
    int row = 0, behind = 0;
    for (int i = 0; i < kKeys + kBehind; ++i) (i < kKeys ? row : behind) += drawn[i];
    const bool sum = drawn[kKeys + kBehind] != 0;
    std::printf("score %g: a sum %d, draws in the row %d, behind it %d\n", static_cast<double>(score), sum, row, behind);
    good = good && sum && behind == 0 && (row > 0) == (score > -100.0f);
  }
  return !good;
}
