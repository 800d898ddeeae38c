// Which tile exact attention takes on an H200 (132 multiprocessors), by the sizes of a call, and how many have their keys
// cut.
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

std::string text_of(const TileCut& cut) {
  if (cut.cut == 0) return "";
  return ", " + std::to_string(cut.whole) + " and " + std::to_string(cut.cut) + " in " + std::to_string(cut.parts);
}

int wrong = 0;

enum class Seen { all, masked, causal, left, right, nonpad };

void expect(const char* want, DType type, int64_t heads, int64_t size, int64_t queries, int64_t keys,
            Seen seen = Seen::all) {
  AttentionJob job{};
  job.params.type = type, job.params.batch = 1, job.params.q_heads = job.params.kv_heads = heads;
  job.params.q_len = queries, job.params.kv_len = job.total_len = keys, job.group = 1;
  job.params.head_size = job.params.v_head_size = size;
  job.params.left_window = seen == Seen::left ? 100 : -1, job.params.right_window = seen == Seen::right ? 100 : -1;
  job.params.is_causal = seen == Seen::causal;
  static const int64_t there = 1;
  if (seen == Seen::masked) job.tensors.mask.data = &there;
  if (seen == Seen::nonpad) job.tensors.nonpad_kv_seqlen = &there;
  std::string found;
  const Device device{90, 132, 227 * 1024};
  choose(job, device, [&](auto choice) { found = name_of(choice) + text_of(cut_of(job, device, choice)); });
  if (found == want) return;
  std::printf("%lld heads of %lld, %lld x %lld: %s, not %s\n", (long long)heads, (long long)size, (long long)queries,
              (long long)keys, found.c_str(), want);
  ++wrong;
}

}  // namespace

int main() {
  const DType half = DType::f16;
  expect("warps", half, 8, 64, 128, 128);  // few queries, whose keys would be cut if there were more
  expect("warps, 0 and 8 in 33", half, 8, 64, 1, 16384);
  expect("shared queries", half, 8, 64, 512, 512);  // 64 tiles
  expect("shared queries, 0 and 64 in 2", half, 8, 64, 512, 4096);
  expect("shared queries", half, 8, 128, 512, 512);
  expect("warpgroups 2", half, 8, 64, 2048, 2048);  // 128 tiles of 128 queries in one wave
  expect("warpgroups 3", half, 6, 64, 4096, 4096);  // 132 tiles of 192 queries in one wave
  expect("warpgroups 3, 132 and 44 in 3", half, 8, 64, 4096, 4096);
  expect("warpgroups 3, 264 and 80 in 3", half, 8, 64, 8192, 8192);  // two waves of thirds
  expect("warpgroups 3, 660 and 28 in 4", half, 8, 64, 16384, 16384);
  expect("warpgroups 2", half, 8, 128, 4096, 4096);  // nearly two waves of 128 queries
  expect("warpgroups 3", half, 6, 128, 4096, 4096);
  expect("warpgroups 3", half, 12, 64, 8192, 8192);  // 120 tiles are over
  expect("warpgroups 3", half, 8, 64, 4096, 4096, Seen::causal);
  expect("warpgroups 2", half, 8, 64, 4096, 4096, Seen::left);
  expect("warpgroups 2", half, 8, 64, 4096, 4096, Seen::right);
  expect("warpgroups 2", half, 8, 64, 4096, 4096, Seen::nonpad);
  expect("warpgroups alike", half, 8, 64, 4096, 4096, Seen::masked);
  expect("warpgroups 3", half, 12, 32, 4096, 4096);
  expect("warps", half, 12, 32, 4096, 4096, Seen::masked);
  expect("simt, 0 and 128 in 3", half, 8, 60, 512, 512);  // rows begin anywhere
  expect("wide", half, 8, 264, 512, 512);
  expect("tf32", DType::f32, 8, 64, 512, 512);
  expect("simt, 0 and 8 in 4", DType::f32, 8, 64, 1, 512);
  return wrong > 0;
}
