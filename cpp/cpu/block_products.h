// The two products of attention over a list of blocks of kv_blocks.h, queries along the lanes as in microkernel.h.
//
//     float q_t[query_elements(blocks)][ld]        <- pack_block_queries, from pack_queries' (head_size, ld)
//     score_blocks: s[16 i + j][ld]                 = q . key j of block list[i], int8 up to q . key_mean
//     value_blocks: o_t[v_head_size][ld]            = o_t * rescale + sum over the keys of the list of p v
//
// p is (16 count, ld) float32 for fp32 blocks, and (8 count, ld) pairs of bfloat16 (keys 2 i, 2 i + 1) for the others:
// exp2_scores of blocked_softmax.h writes either. ld is a multiple of kLanes, `vecs` vectors of it are used.
#pragma once

#include "pack_blocks.h"
#include "tiles.h"

namespace qexport {
namespace QEXPORT_ISA {

// Rows of the packed Q^T, in the elements of the blocks. Tiles read whole rows of keys, whose ends are zero.
static QEXPORT_INLINE int64_t query_elements(const KvBlocks& blocks) {
  return blocks.tiles                          ? blocks.key_row
         : blocks.precision == Precision::fp32 ? blocks.head_size
         : blocks.precision == Precision::bf16 ? (blocks.head_size + 1) / 2
                                               : (blocks.head_size + 3) / 4;
}

// Rows of p that belong to a block.
static QEXPORT_INLINE int64_t value_elements(const KvBlocks& blocks) {
  return blocks.precision == Precision::fp32 ? kBlockKeys : kBlockKeys / 2;
}

#if defined(QEXPORT_LOW_PRECISION)
// In place: q_t (head_size, ld) float32 becomes the elements of the blocks. int8 has one scale per lane.
static void pack_block_queries(const KvBlocks& blocks, float* q_t, int64_t ld, int vecs, float* q_scale) {
  if (blocks.precision == Precision::fp32) return;
  const int64_t size = blocks.head_size;
  for (int64_t at = 0; at < vecs * kLanes; at += kLanes) {
    const auto row = [&](int64_t x) QEXPORT_INLINE_LAMBDA { return x < size ? load<vf>(q_t + x * ld + at) : vf{}; };
    if (blocks.precision == Precision::bf16) {
      for (int64_t i = 0; i < query_elements(blocks); ++i) store(q_t + i * ld + at, bf16_pairs(row(2 * i), row(2 * i + 1)));
      continue;
    }
    vf most{}, check{};
    for (int64_t x = 0; x < size; ++x) {
      const vf q = row(x);
      most = max(q, most), most = max(-q, most);
      check += q - q;
    }
    store(q_scale + at, most * (1.0f / 127.0f) + check);  // NaN where an element is not finite
    const vf inverse = most > 0.0f ? 127.0f / most : vf{};
    const auto byte = [&](int64_t x) QEXPORT_INLINE_LAMBDA {
      return ((vu)_mm512_cvtps_epi32((__m512)(row(x) * inverse)) + 128u) & 0xFFu;
    };
    for (int64_t x = 0; x < size; x += 4) {
      const vu bytes = byte(x) | (byte(x + 1) << 8) | (byte(x + 2) << 16) | (byte(x + 3) << 24);
      store(q_t + x / 4 * ld + at, float_of(bytes));
    }
  }
}
#else
static void pack_block_queries(const KvBlocks&, float*, int64_t, int, float*) {}
#endif

template <int kRows, int kVecs>
static QEXPORT_INLINE void start_scores(vf (&)[kRows][kVecs], const float*) {}
template <int kRows, int kVecs>
static QEXPORT_INLINE void finish_scores(const vf (&sum)[kRows][kVecs], const float*, const float*, float* s, int64_t ld) {
  store_sums(sum, s, ld);
}

// int8: queries are stored plus 128, which the sums of the keys take back.
template <int kRows, int kVecs>
static QEXPORT_INLINE void start_scores(vi (&sum)[kRows][kVecs], const float* extra) {
  for (int b = 0; b < kRows; ++b) {
    int32_t offset;
    __builtin_memcpy(&offset, extra + kBlockKeys + b, 4);
    for (int v = 0; v < kVecs; ++v) sum[b][v] = splat(offset);
  }
}
template <int kRows, int kVecs>
static QEXPORT_INLINE void finish_scores(const vi (&sum)[kRows][kVecs], const float* scale, const float* q_scale, float* s,
                                         int64_t ld) {
  for (int b = 0; b < kRows; ++b) {
    for (int v = 0; v < kVecs; ++v) {
      store(s + b * ld + v * kLanes, to_float(sum[b][v]) * (load<vf>(q_scale + v * kLanes) * scale[b]));
    }
  }
}

template <class Math, int kVecs>
static __attribute__((noinline)) void score_list(const KvBlocks& blocks, const float* keys, const int32_t* list,
                                                 int64_t count, const float* q_t, const float* q_scale, float* s,
                                                 int64_t ld) {
  const int64_t steps = query_elements(blocks);
  for (int64_t i = 0; i < count; ++i, s += kBlockKeys * ld) {
    const float* k = keys + list[i] * blocks.key_block;
    for_row_blocks(kBlockKeys, [&](int64_t j, auto rows) QEXPORT_INLINE_LAMBDA {
      constexpr int kRows = decltype(rows)::value;
      typename Math::Accumulator sum[kRows][kVecs] = {};
      const float* extra = k + kBlockKeys * blocks.key_row + j;  // of int8 keys
      start_scores(sum, extra);
      accumulate<Math>(sum, k + j * blocks.key_row, blocks.key_row, 1, q_t, ld, steps);
      finish_scores(sum, extra, q_scale, s + j * ld, ld);
    });
  }
}

template <class Math, int kVecs>
static __attribute__((noinline)) void value_list(const KvBlocks& blocks, const float* values, const int32_t* list,
                                                 int64_t count, const float* p, float* o_t, int64_t ld,
                                                 const float* rescale) {
  const int64_t steps = value_elements(blocks);
  for_row_blocks(blocks.v_head_size, [&](int64_t x, auto rows) QEXPORT_INLINE_LAMBDA {
    vf sum[decltype(rows)::value][kVecs];
    load_sums(sum, o_t + x * ld, ld, rescale);
    for (int64_t i = 0; i < count; ++i) {
      accumulate<Math>(sum, values + list[i] * blocks.value_block + x, 1, blocks.value_row, p + i * steps * ld, ld, steps);
    }
    store_sums(sum, o_t + x * ld, ld);
  });
}

#if defined(QEXPORT_TILES)
// Accumulators 0 .. kVecs - 1 = the scores of the 16 keys of a block, plus start[lane].
template <int kVecs>
static QEXPORT_INLINE void score_tiles(const KvBlocks& blocks, const float* k, const float* q_t, int64_t ld,
                                       const float* start) {
  for_tiles<kVecs>([&](auto v) QEXPORT_INLINE_LAMBDA { tile_load<v>(start + v * kLanes, 0); });
  for (int64_t x = 0; x < blocks.key_row; x += kBlockKeys) {
    tile_load<kWideA>(k + x, blocks.key_row);
    for_tiles<kVecs>([&](auto v) QEXPORT_INLINE_LAMBDA {
      tile_load<kWideB>(q_t + x * ld + v * kLanes, ld);
      tile_product<v, kWideA, kWideB>();
    });
  }
}

template <int kVecs>
static QEXPORT_INLINE void store_tiles(float* c, int64_t ld) {
  for_tiles<kVecs>([&](auto v) QEXPORT_INLINE_LAMBDA { tile_store<v>(c + v * kLanes, ld); });
}

template <int kVecs>
static void score_tile_list(const KvBlocks& blocks, const float* keys, const int32_t* list, int64_t count, const float* q_t,
                            float* s, int64_t ld) {
  alignas(64) const float zero[kVecs * kLanes] = {};
  for (int64_t i = 0; i < count; ++i, s += kBlockKeys * ld) {
    score_tiles<kVecs>(blocks, keys + list[i] * blocks.key_block, q_t, ld, zero);
    store_tiles<kVecs>(s, ld);
  }
}

// o_t has whole tiles of rows.
template <int kVecs>
static void value_tile_list(const KvBlocks& blocks, const float* values, const int32_t* list, int64_t count, const float* p,
                            float* o_t, int64_t ld) {
  const int64_t steps = value_elements(blocks);
  for (int64_t x = 0; x < blocks.v_head_size; x += kBlockKeys) {
    for_tiles<kVecs>([&](auto n) QEXPORT_INLINE_LAMBDA { tile_load<n>(o_t + x * ld + n * kLanes, ld); });
    const auto add = [&](auto pair, int64_t i) QEXPORT_INLINE_LAMBDA {
      constexpr int a = pair ? kWideA : kHalfA, b = pair ? kWideB : kHalfB;
      tile_load<a>(values + blocks.value_start(list[i]) + x * blocks.value_row, blocks.value_row);
      for_tiles<kVecs>([&](auto n) QEXPORT_INLINE_LAMBDA {
        tile_load<b>(p + i * steps * ld + n * kLanes, ld);
        tile_product<n, a, b>();
      });
    };
    for (int64_t i = 0; i < count;) {
      const bool pair = i + 1 < count && list[i] % 2 == 0 && list[i + 1] == list[i] + 1;
      pair ? add(std::true_type{}, i) : add(std::false_type{}, i);
      i += pair ? 2 : 1;
    }
    store_tiles<kVecs>(o_t + x * ld, ld);
  }
}

// run(integral constant vecs) for 1 to 4 vectors of lanes.
template <class Run>
static QEXPORT_INLINE void for_all_lanes(int vecs, const Run& run) {
  if (vecs == 1) return run(std::integral_constant<int, 1>{});
  if (vecs == 2) return run(std::integral_constant<int, 2>{});
  vecs == 3 ? run(std::integral_constant<int, 3>{}) : run(std::integral_constant<int, 4>{});
}
#endif

// o_t[rows][ld] *= rescale[lanes].
static void rescale_rows(float* o_t, int64_t ld, int64_t rows, int vecs, const float* rescale) {
  for (int64_t at = 0; at < vecs * kLanes; at += kLanes) {
    const vf factor = load<vf>(rescale + at);
    if (!lane_bits(factor != 1.0f)) continue;
    for (int64_t x = 0; x < rows; ++x) store(o_t + x * ld + at, load<vf>(o_t + x * ld + at) * factor);
  }
}

// body(v, integral constant kVecs) for all vectors of lanes, two at a time.
template <class Body>
static QEXPORT_INLINE void for_lanes(int vecs, const Body& body) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) body(v * kLanes, RowCount<2>{});
  if (v < vecs) body(v * kLanes, RowCount<1>{});
}

// `keys` and `values` below: KvBlocks::head_keys and head_values of the head. q_scale: int8 only.
static __attribute__((noinline)) void score_blocks(const KvBlocks& blocks, const float* keys, const int32_t* list,
                                                   int64_t count, const float* q_t, const float* q_scale, float* s,
                                                   int64_t ld, int vecs) {
#if defined(QEXPORT_TILES)
  if (blocks.tiles) {
    return for_all_lanes(vecs,
                         [&](auto n) QEXPORT_INLINE_LAMBDA { score_tile_list<n>(blocks, keys, list, count, q_t, s, ld); });
  }
#endif
  for_lanes(vecs, [&](int at, auto n) QEXPORT_INLINE_LAMBDA {
    constexpr int kVecs = decltype(n)::value;
#if defined(QEXPORT_LOW_PRECISION) && !defined(QEXPORT_TILES)
    if (blocks.precision == Precision::bf16) {
      return score_list<Bf16Math, kVecs>(blocks, keys, list, count, q_t + at, nullptr, s + at, ld);
    }
    if (blocks.precision == Precision::int8) {
      return score_list<Int8Math, kVecs>(blocks, keys, list, count, q_t + at, q_scale + at, s + at, ld);
    }
#endif
    score_list<Fp32Math, kVecs>(blocks, keys, list, count, q_t + at, q_scale, s + at, ld);
  });
}

// rescale null: 1.
static __attribute__((noinline)) void value_blocks(const KvBlocks& blocks, const float* values, const int32_t* list,
                                                   int64_t count, const float* p, float* o_t, int64_t ld, int vecs,
                                                   const float* rescale) {
#if defined(QEXPORT_TILES)
  if (blocks.tiles) {
    if (rescale) rescale_rows(o_t, ld, blocks.v_head_size, vecs, rescale);
    return for_all_lanes(vecs,
                         [&](auto n) QEXPORT_INLINE_LAMBDA { value_tile_list<n>(blocks, values, list, count, p, o_t, ld); });
  }
#endif
  for_lanes(vecs, [&](int at, auto n) QEXPORT_INLINE_LAMBDA {
    constexpr int kVecs = decltype(n)::value;
    const float* factor = rescale ? rescale + at : nullptr;
#if defined(QEXPORT_LOW_PRECISION) && !defined(QEXPORT_TILES)
    if (blocks.precision != Precision::fp32) {
      return value_list<Bf16Math, kVecs>(blocks, values, list, count, p + at, o_t + at, ld, factor);
    }
#endif
    value_list<Fp32Math, kVecs>(blocks, values, list, count, p + at, o_t + at, ld, factor);
  });
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
