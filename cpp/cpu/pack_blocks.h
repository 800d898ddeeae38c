// Writes K and V into the blocks of kv_blocks.h.
#pragma once

#include "key_source.h"
#include "microkernel.h"
#include "tiles.h"

namespace qexport {
namespace QEXPORT_ISA {

template <bool kPlain>
static QEXPORT_INLINE void pack_fp32_row(DType type, const char* row, int64_t size, int64_t stride, float* dst) {
  for (int64_t x = 0; x < stride; x += kLanes) store(dst + x, row_part<kPlain>(type, row, size, x));
}

// mean[x] over at most kMeanKeys keys of the head, evenly spaced; 0 unless it brings 7 of 8 of them nearer to zero. Any
// vector would do: it only has to take out what the keys have in common, must be finite, and must not be made by a few huge
// keys, which may well be masked, since little would be left of the others.
constexpr int64_t kMeanKeys = 64;
static void key_mean(const AttentionJob& job, int64_t b, int64_t kv_head) {
  constexpr int kVecs = 64 / kLanes;  // columns at a time: rows may lie far apart, and are read in pieces of some length
  const KvBlocks& blocks = job.blocks;
  const KeySource source(job, b, kv_head);
  float* mean = blocks.head_mean(b * job.params.kv_heads + kv_head);
  const int64_t step = (source.valid + kMeanKeys - 1) / kMeanKeys;
  const float share = source.valid > 0 ? 1.0f / static_cast<float>((source.valid + step - 1) / step) : 0.0f;
  for (int64_t x = 0; x < blocks.head_size; x += kVecs * kLanes) {
    vf sum[kVecs] = {}, nearer[kVecs] = {};
    const auto part = [&](int64_t j, int v) QEXPORT_INLINE_LAMBDA {
      return row_part(job.params.type, source.row(false, j), blocks.head_size, x + v * kLanes);
    };
    for (int64_t j = 0; j < source.valid; j += step) {
      for (int v = 0; v < kVecs; ++v) {
        const vf k = part(j, v) * share;
        sum[v] += k - k == 0.0f ? k : vf{};
      }
    }
    for (int64_t j = 0; j < source.valid; j += step) {
      for (int v = 0; v < kVecs; ++v) {
        const vf k = part(j, v), rest = k - sum[v];
        nearer[v] += max(rest, -rest) < max(k, -k) ? vf{} + share : vf{};
      }
    }
    for (int v = 0; v < kVecs && x + v * kLanes < blocks.mean_row; ++v) {
      store(mean + x + v * kLanes, nearer[v] > 0.875f ? sum[v] : vf{});
    }
  }
}

#if defined(QEXPORT_LOW_PRECISION)
static QEXPORT_INLINE vu bf16_bits(vf x) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// (lo[lane], hi[lane]) side by side.
static QEXPORT_INLINE vf bf16_pairs(vf lo, vf hi) { return float_of(bf16_bits(lo) | (bf16_bits(hi) << 16)); }

// Elements x .. x + kLanes of a key less the mean, if there is one; zero where there are none.
template <bool kPlain>
static QEXPORT_INLINE vf centred_part(DType type, const char* row, const float* mean, int64_t size, int64_t x) {
  if (!row || x >= size) return vf{};
  const vf k = row_part<kPlain>(type, row, size, x);
  if (!mean) return k;
  const vf rest = k - load<vf>(mean + x);
  if (kPlain || x + kLanes <= size) return rest;
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << (size - x)) - 1), (__m512)rest);
}

template <bool kPlain>
static QEXPORT_INLINE void pack_bf16_row(DType type, const char* row, int64_t size, int64_t stride, float* dst,
                                         const float* mean = nullptr) {
  for (int64_t i = 0; i < stride; i += kLanes) {
    const vf lo = centred_part<kPlain>(type, row, mean, size, 2 * i);
    const vf hi = centred_part<kPlain>(type, row, mean, size, 2 * i + kLanes);
    store(dst + i, (vf)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo));
  }
}

template <bool kPlain>
static QEXPORT_INLINE void pack_bf16_pair(DType type, const char* even, const char* odd, int64_t size, int64_t stride,
                                          float* dst) {
  for (int64_t x = 0; x < stride; x += kLanes) {
    store(dst + x, bf16_pairs(row_part<kPlain>(type, even, size, x), row_part<kPlain>(type, odd, size, x)));
  }
}

#if defined(QEXPORT_TILES)
// The values of 16 keys transposed, rows of dst `stride` apart.
template <bool kPlain>
static QEXPORT_INLINE void pack_value_tile(DType type, const char* const* value, int64_t size, int64_t stride, float* dst) {
  constexpr int kPairs = kBlockKeys / 2;
  alignas(64) uint16_t places[2 * kLanes];  // of (even, odd) side by side in (16 even, 16 odd)
  for (int i = 0; i < kLanes; ++i)
    places[2 * i] = static_cast<uint16_t>(i), places[2 * i + 1] = static_cast<uint16_t>(kLanes + i);
  const __m512i order = _mm512_load_si512(places);
  for (int64_t x = 0; x < size; x += kLanes) {
    vf m[kPairs];
    for (int j = 0; j < kPairs; ++j) {
      const vf even = row_part<kPlain>(type, value[2 * j], size, x), odd = row_part<kPlain>(type, value[2 * j + 1], size, x);
      m[j] = (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
    }
    transpose_step<1>(m);
    transpose_step<2>(m);
    transpose_step<4>(m);
    for (int i = 0; i < kPairs; ++i) {  // m[i] holds the rows x + i and x + i + 8
      float* row = dst + (x + i) * stride;
      _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256((__m512i)m[i]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(row + kPairs * stride), _mm512_extracti64x4_epi64((__m512i)m[i], 1));
    }
  }
}
#endif

// One int8 key; its scale is NaN where an element of it is not finite.
template <bool kPlain>
static QEXPORT_INLINE void pack_int8_row(DType type, const char* row, const float* mean, int64_t size, int64_t stride,
                                         float* dst, float* scale, int32_t* offset) {
  const auto centred = [&](int64_t x) QEXPORT_INLINE_LAMBDA { return centred_part<kPlain>(type, row, mean, size, x); };
  vf most{};
  __mmask16 special = 0;
  for (int64_t x = 0; x < size; x += kLanes) {
    const vf k = centred(x);
    most = max(float_of(bits_of(k) & 0x7FFFFFFFu), most);
    special |= _mm512_fpclass_ps_mask((__m512)k, 0x99);  // NaN or infinite
  }
  const float highest = _mm512_reduce_max_ps((__m512)most);
  const float inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
  __m512i sum = _mm512_setzero_si512();
  char* bytes = reinterpret_cast<char*>(dst);
  for (int64_t x = 0; x < 4 * stride; x += kLanes) {
    const __m512i k = _mm512_cvtps_epi32((__m512)(centred(x) * inverse));
    sum = _mm512_add_epi32(sum, k);
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + x), _mm512_cvtsepi32_epi8(k));
  }
  *scale = special ? __builtin_nanf("") : highest * (1.0f / 127.0f);
  *offset = special ? 0 : -128 * _mm512_reduce_add_epi32(sum);
}
#endif

template <bool kPlain>
static void pack_block(const KvBlocks& blocks, DType type, const char* const* key, const char* const* value,
                       [[maybe_unused]] const float* mean, float* k, float* v) {
  const int64_t size = blocks.head_size, v_size = blocks.v_head_size, stride = blocks.key_row, v_stride = blocks.value_row;
  if (blocks.precision == Precision::fp32) {
    for (int64_t j = 0; j < kBlockKeys; ++j, k += stride, v += v_stride) {
      pack_fp32_row<kPlain>(type, key[j], size, stride, k);
      pack_fp32_row<kPlain>(type, value[j], v_size, v_stride, v);
    }
    return;
  }
#if defined(QEXPORT_LOW_PRECISION)
  float* extra = k + kBlockKeys * stride;
  for (int64_t j = 0; j < kBlockKeys; ++j, k += stride) {
    if (blocks.precision == Precision::bf16) {
      pack_bf16_row<kPlain>(type, key[j], size, stride, k, mean);
    } else {
      pack_int8_row<kPlain>(type, key[j], mean, size, stride, k, extra + j,
                            reinterpret_cast<int32_t*>(extra + kBlockKeys) + j);
    }
  }
#if defined(QEXPORT_TILES)
  if (blocks.tiles) return pack_value_tile<kPlain>(type, value, v_size, v_stride, v);
#endif
  for (int64_t j = 0; j < kBlockKeys; j += 2, v += v_stride) {
    pack_bf16_pair<kPlain>(type, value[j], value[j + 1], v_size, v_stride, v);
  }
#endif
}

static void pack_blocks(const AttentionJob& job, int64_t b, int64_t kv_head, int64_t first, int64_t end) {
  const KvBlocks& blocks = job.blocks;
  const DType type = job.params.type;
  const KeySource source(job, b, kv_head);
  const int64_t head = b * job.params.kv_heads + kv_head;
  const int32_t* order = blocks.head_order(head);
  for (int64_t i = first; i < end; ++i) {
    const char *key[kBlockKeys], *value[kBlockKeys];
    bool all_there = true;
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      const int64_t place = i * kBlockKeys + j, index = order ? order[place] : place;
      key[j] = source.row(false, index), value[j] = source.row(true, index);
      all_there = all_there && key[j];
      // The rows of the next block: heads side by side, or an order, are beyond the hardware prefetcher.
      if (i + 1 == end) continue;
      const int64_t next = order ? order[place + kBlockKeys] : place + kBlockKeys;
      prefetch_row(source.row(false, next), blocks.head_size * element_size(type));
      prefetch_row(source.row(true, next), blocks.v_head_size * element_size(type));
    }
    const float* mean = blocks.mean_row > 0 ? blocks.head_mean(head) : nullptr;
    const bool plain = all_there && type == DType::f32 && blocks.head_size % 16 == 0 && blocks.v_head_size % 16 == 0;
    float* k = blocks.head_keys(head) + i * blocks.key_block;
    float* v = blocks.head_values(head) + blocks.value_start(i);
    plain ? pack_block<true>(blocks, type, key, value, mean, k, v) : pack_block<false>(blocks, type, key, value, mean, k, v);
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
