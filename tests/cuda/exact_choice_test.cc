// Which tile exact attention takes on an H200 (132 multiprocessors), by the sizes of a call.
#include "exact_choice.cuh"

#include <cstdio>
#include <string>

using namespace qexport;
using namespace qexport::cuda;

namespace {

template <class Tile, template <class> class State>
std::string name_of(Choice<Tile, State>) {
  if constexpr (std::is_same<State<Tile>, SimtState<Tile>>::value) {
    return "simt";
  } else if constexpr (Tile::kPipeline) {
    return Tile::kSplits > 1 ? "shared queries" : "warpgroups " + std::to_string(Tile::kConsumers);
  } else {
    return Tile::kWarpgroups ? "warpgroups alike" : kTf32<Tile> ? "tf32" : "warps";
  }
}
template <class T>
std::string name_of(Wide<T>) {
  return "wide";
}

int wrong = 0;

void expect(const char* want, DType type, int64_t heads, int64_t size, int64_t queries, int64_t keys, bool masked = false) {
  AttentionJob job{};
  job.params.type = type, job.params.batch = 1, job.params.q_heads = job.params.kv_heads = heads;
  job.params.q_len = queries, job.params.kv_len = job.total_len = keys, job.group = 1;
  job.params.head_size = job.params.v_head_size = size;
  job.params.left_window = job.params.right_window = -1;
  static const char mask = 1;
  if (masked) job.tensors.mask.data = &mask;
  std::string found;
  choose(job, {90, 132, 227 * 1024}, [&](auto choice) { found = name_of(choice); });
  if (found == want) return;
  std::printf("%lld heads of %lld, %lld x %lld: %s, not %s\n", (long long)heads, (long long)size, (long long)queries,
              (long long)keys, found.c_str(), want);
  ++wrong;
}

}  // namespace

int main() {
  const DType half = DType::f16;
  expect("warps", half, 8, 64, 128, 128);           // keys would be split
  expect("shared queries", half, 8, 64, 512, 512);  // 64 tiles
  expect("shared queries", half, 8, 128, 512, 512);
  expect("warpgroups 2", half, 8, 64, 2048, 2048);  // 128 tiles of 128 queries in one wave
  expect("warpgroups 3", half, 6, 64, 4096, 4096);  // 132 tiles of 192 queries in one wave
  expect("warpgroups 3", half, 8, 128, 16384, 16384);
  expect("warpgroups alike", half, 8, 64, 4096, 4096, true);
  expect("warps", half, 12, 32, 4096, 4096);
  expect("simt", half, 8, 60, 512, 512);  // rows begin anywhere
  expect("wide", half, 8, 264, 512, 512);
  expect("tf32", DType::f32, 8, 64, 512, 512);
  expect("simt", DType::f32, 8, 64, 1, 512);
  return wrong > 0;
}
