// Which tile exact attention takes: by sizes and by the device.
#pragma once

#include <algorithm>

#include "exact_cut.cuh"
#include "row_chunk.cuh"
#include "simt.cuh"

namespace qexport {
namespace cuda {

// 16-byte rows everywhere, so that they can be copied asynchronously, at distances of 32 bits, and what put_row asks of the
// output.
template <class T>
bool aligned_rows(const AttentionJob& job) {
  const auto aligned = [](const HeadRows& rows) {
    return starts_on_16_bytes(rows, sizeof(T)) && std::max(rows.row_stride, rows.head_stride) <= INT32_MAX;
  };
  const QuantumAttentionTensors& t = job.tensors;
  const T* const y = static_cast<const T*>(t.y);
  const bool units = takes_whole_units(y, t.y_row_stride) && takes_whole_units(y, t.y_head_stride) &&
                     takes_whole_units(y, t.y_batch_stride);
  return units && job.params.head_size % kChunkElements<T> == 0 && job.params.v_head_size % kChunkElements<T> == 0 &&
         aligned(t.q) && aligned(t.k) && aligned(t.v) &&
         (job.params.past_len == 0 || (aligned(t.past_key) && aligned(t.past_value)));
}

template <class Tile>
using ExactTileOf = ExactTile<typename Tile::T, Tile::kQueries, Tile::kKeys, !Tile::kPipeline>;

template <class Tile_, template <class> class State_>
struct Choice {
  using Tile = Tile_;
  template <class T>
  using State = State_<T>;
  static size_t shared_bytes(const AttentionJob& job) { return Tile::kSharedBytes + ExactTileOf<Tile>::shared_bytes(job); }
};
template <class T, int kHead, int kRowTiles, int kBlocksPerProcessor>
using Flash = Choice<FlashTile<T, kHead, kRowTiles, 4, 64, kBlocksPerProcessor>, FlashState>;
template <int kHead, int kRowTiles, int kWarps, int kBlocksPerProcessor>
using Tf32Flash = Choice<FlashTile<float, kHead, kRowTiles, kWarps, 32, kBlocksPerProcessor>, FlashState>;
template <class T, int kHead, int kWarps, int kBlocksPerProcessor>
using Warpgroups = Choice<FlashTile<T, kHead, 1, kWarps, 64, kBlocksPerProcessor, true>, FlashState>;
template <class T, int kHead, int kConsumers, int kKeys, int kStages, bool kTurns = true>
using Pipeline = Choice<PipelineTile<T, kHead, kConsumers, kKeys, kStages, kTurns>, FlashState>;
template <class T, int kHead>
using SplitPipeline = Choice<PipelineTile<T, kHead, 2, 64, 5, false, 2>, FlashState>;
template <class T, int kHead, int kRows, int kKeys, int kBlocksPerProcessor>
using Simt = Choice<SimtTile<T, kHead, kRows, kKeys, kBlocksPerProcessor>, SimtState>;
template <class T_>
struct Wide {
  using T = T_;
};
template <class Tile, template <class> class State>
TileCut cut_of(const AttentionJob& job, const Device& device, Choice<Tile, State>) {
  return cut_of<Tile>(job, device);
}
template <class T>
TileCut cut_of(const AttentionJob&, const Device&, Wide<T>) {
  return {0, 0, 1, 1};
}

// Visits the large choice where it gives every multiprocessor `waves` blocks and fits into it, else the small one.
template <class Large, class Small, class Visit>
void visit_choice(const AttentionJob& job, const Device& device, const Visit& visit, double waves = 1.0) {
  const bool fits = Large::shared_bytes(job) <= static_cast<size_t>(device.shared_bytes);
  if (fits && all_tiles<typename Large::Tile>(job) >= waves * device.multiprocessors) return visit(Large{});
  if (Small::shared_bytes(job) <= static_cast<size_t>(device.shared_bytes)) return visit(Small{});
  visit(Wide<typename Small::Tile::T>{});
}

// Whether the queries fill tiles of warpgroups with roles, on the only device that has them. Those take no mask, and are
// nothing for few queries, whose keys are split.
inline bool pipeline_applies(const AttentionJob& job, const Device& device) {
  const QuantumAttentionParams& p = job.params;
  return device.capability == 90 && !job.tensors.mask.data &&
         p.batch * p.q_heads * p.q_len > int64_t{kFlashMostJoined} * device.multiprocessors;
}

// Visits the choice that is done first. A wave of tiles, one on each multiprocessor, takes these shares of the time that one
// of the large ones takes, as measured on an H200 at 2048 to 16384 keys.
template <class Small, class Middle, class Large, class Visit>
void visit_cheapest(const AttentionJob& job, const Device& device, const Visit& visit, double middle_share) {
  constexpr double kSmallShare = 0.47;
  const auto keys = [&](const TileCut& cut) { return keys_in_turn(job, device, cut); };
  const double small = kSmallShare * keys(cut_of<typename Small::Tile>(job, device));
  const double middle = middle_share * keys(cut_of<typename Middle::Tile>(job, device));
  const double large = keys(cut_of<typename Large::Tile>(job, device));
  if (large < std::min(small, middle)) return visit(Large{});
  if (middle < small) return visit(Middle{});
  visit(Small{});
}

template <class T, class Visit>
void choose_half(const AttentionJob& job, const Device& device, const Visit& visit) {
  const int64_t size = std::max(job.params.head_size, job.params.v_head_size);
  if (device.capability >= 80 && size <= 128 && aligned_rows<T>(job)) {
    if (pipeline_applies(job, device)) {
      if (size <= 64) {
        return visit_cheapest<SplitPipeline<T, 64>, Pipeline<T, 64, 2, 128, 3>, Pipeline<T, 64, 3, 128, 3>>(job, device,
                                                                                                            visit, 0.8);
      }
      return visit_cheapest<SplitPipeline<T, 128>, Pipeline<T, 128, 2, 128, 2>, Pipeline<T, 128, 3, 64, 3, false>>(
          job, device, visit, 0.66);
    }
    if (device.capability == 90) {  // the waves are those from which warpgroups were faster on an H200
      if (size > 32 && size <= 64) return visit_choice<Warpgroups<T, 64, 8, 2>, Flash<T, 64, 1, 3>>(job, device, visit, 1.5);
      using Large = Warpgroups<T, 128, 12, 1>;
      if (size > 64 && all_tiles<typename Large::Tile>(job) >= 4 * device.multiprocessors) {
        return visit_choice<Large, Flash<T, 128, 1, 2>>(job, device, visit);
      }
    }
    if (size <= 32) return visit_choice<Flash<T, 32, 2, 2>, Flash<T, 32, 1, 4>>(job, device, visit);
    if (size <= 64) return visit_choice<Flash<T, 64, 2, 2>, Flash<T, 64, 1, 3>>(job, device, visit);
    return visit_choice<Flash<T, 128, 2, 2>, Flash<T, 128, 1, 2>>(job, device, visit);
  }
  if (size <= 64) return visit_choice<Simt<T, 64, 2, 32, 3>, Simt<T, 64, 2, 32, 3>>(job, device, visit);
  if (size <= 128) return visit_choice<Simt<T, 128, 2, 32, 3>, Simt<T, 128, 2, 32, 3>>(job, device, visit);
  if (size <= 256) return visit_choice<Simt<T, 256, 2, 16, 2>, Simt<T, 256, 2, 16, 2>>(job, device, visit);
  visit(Wide<T>{});
}
// Whether matrix units take a call of float32: its rows fill at least half a tile, which all is computed of.
template <class Small>
bool tf32_applies(const AttentionJob& job, const Device& device) {
  using Tile = typename Small::Tile;
  return device.capability >= 80 && aligned_rows<float>(job) &&
         2 * pack_of<Tile>(job) * job.params.q_len >= Tile::kQueries &&
         Small::shared_bytes(job) <= static_cast<size_t>(device.shared_bytes);
}
template <class Visit>
void choose_float(const AttentionJob& job, const Device& device, const Visit& visit) {
  const int64_t size = std::max(job.params.head_size, job.params.v_head_size);
  using Small32 = Tf32Flash<32, 1, 4, 3>;
  using Small64 = Tf32Flash<64, 1, 4, 3>;
  using Small128 = Tf32Flash<128, 1, 4, 2>;
  if (size <= 32 && tf32_applies<Small32>(job, device)) {
    return visit_choice<Tf32Flash<32, 2, 4, 2>, Small32>(job, device, visit);
  }
  if (size <= 64 && tf32_applies<Small64>(job, device)) {
    return visit_choice<Tf32Flash<64, 2, 4, 2>, Small64>(job, device, visit);
  }
  if (size <= 128 && tf32_applies<Small128>(job, device)) {
    return visit_choice<Tf32Flash<128, 1, 8, 1>, Small128>(job, device, visit);
  }
  if (size <= 32) return visit_choice<Simt<float, 32, 8, 64, 2>, Simt<float, 32, 2, 32, 4>>(job, device, visit);
  if (size <= 64) return visit_choice<Simt<float, 64, 8, 64, 2>, Simt<float, 64, 2, 32, 4>>(job, device, visit);
  if (size <= 128) return visit_choice<Simt<float, 128, 8, 32, 2>, Simt<float, 128, 2, 32, 3>>(job, device, visit);
  if (size <= 256) return visit_choice<Simt<float, 256, 2, 16, 2>, Simt<float, 256, 2, 16, 2>>(job, device, visit);
  visit(Wide<float>{});
}
template <class T, class Visit>
void choose_of(const AttentionJob& job, const Device& device, const Visit& visit) {
  if constexpr (sizeof(T) == 2) {
    choose_half<T>(job, device, visit);
  } else {
    choose_float(job, device, visit);
  }
}
template <class Visit>
void choose(const AttentionJob& job, const Device& device, const Visit& visit) {
  visit_type(job.params.type, [&](auto element) { choose_of<decltype(element)>(job, device, visit); });
}

// Launches the kernels of one type; exact_kernel.cuh.
template <class T>
void start_exact(Status& status, const ExactLaunch& exact, const Device& device, void* scratch, void* stream);

}  // namespace cuda
}  // namespace qexport
