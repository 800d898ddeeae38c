// Which keys a row samples, and with which weight: docs/math.md, lane by lane for kLanes rows at a time.
#pragma once

#include "qexport/philox.h"
#include "row_scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int32_t kOne = 1 << 24;  // T: probability 1 in fixed point

// Throughout, x_j = +inf marks a key that is taken for certain whatever c is: the largest keys of `hybrid`, and every key of
// a row that is computed exactly.

// c with sum_j min(1, c x_j) = budget - taken over the keys not taken beforehand, which sum to `rest` and have the maximum
// `largest`; budget and taken are those of each lane. Lanes without such keys get 1.
static vf inclusion_factor(const float* x, int64_t ld, int64_t n, vf budget, vi taken, vf rest, vf largest) {
  vf c = rest > 0.0f ? (budget - to_float(taken)) / rest : splat(1.0f);
  vi certain = taken;  // C of the last round
  vi active = (rest > 0.0f) & (c * largest >= 1.0f);
  while (lane_bits(active)) {
    vi count{};
    rest = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
      const vf xj = load<vf>(x + j * ld);
      const vi sure = c * xj >= 1.0f;
      count -= sure;
      return sure ? vf{} : xj;
    });
    const vf next = (budget - to_float(count)) / rest;
    active &= (count > certain) & (rest > 0.0f) & (next > c);
    c = active ? next : c;
    certain = count;
  }
  return c;
}

// Marks the k largest x of each lane (ties: lowest index; never x = 0) as taken; lanes with k = 0 stay as they are.
// Returns the sum, and in `largest` the maximum, of the other x.
// The k-th largest is found by bisection of the bit patterns, which order as the floats do since x >= 0.
static vf take_largest(float* x, int64_t ld, int64_t n, vi k, vf* largest) {
  vi threshold = k > 0 ? vi{} : splat(INT32_MAX);  // the largest found t with #{x >= t} >= k
  vi open = k > 0;                                 // lanes where #{x >= t} is not k yet
  for (int bit = 30; bit >= 0 && lane_bits(open); --bit) {
    const vi trial = threshold | (1 << bit);
    vi count{};
    for (int64_t j = 0; j < n; ++j) count -= load<vi>(x + j * ld) >= trial;
    threshold = (open & (count >= k)) ? trial : threshold;
    open &= count != k;
  }
  vi above{};
  for (int64_t j = 0; j < n; ++j) above -= load<vi>(x + j * ld) > threshold;
  vi ties = k - above;  // how many keys equal to the threshold still fit, in index order
  vf most{};
  const vf rest = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
    const vi bits = load<vi>(x + j * ld);
    const vi tie = (bits == threshold) & (ties > 0);
    ties += tie;
    const vi taken = ((bits > threshold) | tie) & (bits > 0);
    const vf xj = load<vf>(x + j * ld);
    const vf other = (taken | (xj == kInf)) ? vf{} : xj;
    most = max(other, most);
    if (lane_bits(taken)) store(x + j * ld, taken ? splat(kInf) : xj);
    return other;
  });
  *largest = most;
  return rest;
}

// Where the values of the keys of a block lie: those before `split` in the past.
struct ValueRows {
  const float *past, *fresh;
  int64_t split, past_stride, fresh_stride;
  bool direct;  // float32 in memory; else every row is converted when it is needed
};

static ValueRows value_rows(const AttentionJob& job, const RowBlock& block) {
  const QuantumAttentionParams& p = job.params;
  const HeadRows &past = job.tensors.past_value, &fresh = job.tensors.v;
  ValueRows rows{nullptr, nullptr, p.past_len, past.row_stride, fresh.row_stride, p.type == DType::f32 || job.packed_value};
  if (job.packed_value) {
    rows.fresh_stride = packed_row(p.v_head_size);
    rows.fresh = job.packed_value + (block.batch * p.kv_heads + block.kv_head) * job.total_len * rows.fresh_stride;
    rows.split = 0;
  } else if (rows.direct) {
    if (p.past_len > 0) rows.past = reinterpret_cast<const float*>(row_of(past, p.type, block.batch, block.kv_head, 0));
    rows.fresh = reinterpret_cast<const float*>(row_of(fresh, p.type, block.batch, block.kv_head, 0));
  }
  return rows;
}

static QEXPORT_INLINE const float* value_row(const AttentionJob& job, const RowBlock& block, const ValueRows& rows,
                                             int64_t j, float* buffer) {
  if (!rows.direct) return key_rows(job, true, block.batch, block.kv_head, j, 1, buffer).data;
  return j < rows.split ? rows.past + j * rows.past_stride : rows.fresh + (j - rows.split) * rows.fresh_stride;
}

static QEXPORT_INLINE void add_scaled(float* dst, const float* src, float factor, int64_t n) {
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes) store(dst + x, load<vf>(dst + x) + load<vf>(src + x) * factor);
  for (; x < n; ++x) dst[x] += src[x] * factor;
}

// o[lane] += w_j v_j for `count` keys, their rows `stride` apart from `values` on, each of kVectors vectors. What a loop
// over rows of any size asks of memory beside the values costs as much as they do.
template <int kVectors>
static void add_rows(const float* values, int64_t stride, const int32_t* place, const float* w, int64_t count, float* o,
                     int64_t ld_o) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t at = static_cast<uint32_t>(place[i]);
    const float* src = values + at / kLanes * stride;
    float* dst = o + at % kLanes * ld_o;
    for (int x = 0; x < kVectors * kLanes; x += kLanes) store(dst + x, load<vf>(dst + x) + load<vf>(src + x) * w[i]);
  }
}

// o[lane] += w_j v_j and sum[lane] += w_j for the waiting keys, w_j = p_j T / f_j.
static void add_chosen(const AttentionJob& job, const RowBlock& block, const ValueRows& values, const RowScratch& scratch,
                       int64_t begin, int64_t count, float* o, int64_t ld_o, float* sum) {
  const int32_t* place = scratch.chosen.place;
  float* w = reinterpret_cast<float*>(scratch.chosen.p);
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf f = to_float(load<vi>(scratch.chosen.f + i));
    store(w + i, load<vf>(w + i) * static_cast<float>(kOne) / f);
  }
  for (int64_t i = 0; i < count; ++i) sum[static_cast<uint32_t>(place[i]) % kLanes] += w[i];
  const int64_t size = job.params.v_head_size;
  if (values.direct && values.split == 0 && size % kLanes == 0) {
    const float* first = values.fresh + begin * values.fresh_stride;
    switch (size / kLanes) {
      case 2:
        return add_rows<2>(first, values.fresh_stride, place, w, count, o, ld_o);
      case 4:
        return add_rows<4>(first, values.fresh_stride, place, w, count, o, ld_o);
      case 8:
        return add_rows<8>(first, values.fresh_stride, place, w, count, o, ld_o);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t at = static_cast<uint32_t>(place[i]);
    add_scaled(o + at % kLanes * ld_o, value_row(job, block, values, begin + at / kLanes, scratch.keys), w[i], size);
  }
}

// Systematic sampling of one column of rows: o[lane] = sum over the chosen keys of w_j v_j; returns sum of w_j.
static vf systematic(const AttentionJob& job, const RowBlock& block, const RowScratch& scratch, int64_t begin, int64_t n,
                     int64_t ld, const float* p, const float* x, vf c, vu offset, float* o, int64_t ld_o) {
  const ValueRows values = value_rows(job, block);
  const Chosen& chosen = scratch.chosen;
  alignas(64) float sum[kLanes] = {};
  const vf scaled = c * static_cast<float>(kOne);
  vu cumulative = static_cast<uint32_t>(kOne - 1) - offset, before{};
  vi place;
  for (int lane = 0; lane < kLanes; ++lane) place[lane] = lane;
  int64_t waiting = 0;
  for (int64_t j = 0; j < n; ++j, place += kLanes) {
    const vf xj = load<vf>(x + j * ld);
    // f_j = min(T, floor(c x_j T) + 1) where x_j > 0
    vi f = to_int(min(xj * scaled, splat(static_cast<float>(kOne)))) + 1;
    f = f > kOne ? splat(kOne) : f;
    cumulative += (vu)(xj > 0.0f ? f : vi{});
    const vu stratum = cumulative >> 24;
    const uint32_t bits = lane_bits((vi)(stratum != before));
    before = stratum;
    store_compressed(chosen.place + waiting, bits, place);
    store_compressed(chosen.p + waiting, bits, load<vi>(p + j * ld));
    store_compressed(chosen.f + waiting, bits, f);
    waiting += __builtin_popcount(bits);
    if (waiting >= kChosen - kLanes) {
      add_chosen(job, block, values, scratch, begin, waiting, o, ld_o, sum);
      waiting = 0;
    }
  }
  add_chosen(job, block, values, scratch, begin, waiting, o, ld_o, sum);
  return load<vf>(sum);
}

// Draws with replacement of one row (lane) from the prefix sums f[n][ld]; o += the weighted values, returns sum of weights.
static float multinomial(const AttentionJob& job, const RowBlock& block, const RowScratch& scratch, int64_t begin, int64_t n,
                         int64_t ld, const float* p, const uint32_t* f, int64_t samples, PhiloxBlock counter, float* o) {
  const QuantumAttentionParams& params = job.params;
  const uint64_t seed = static_cast<uint64_t>(params.seed);
  const uint32_t total = f[(n - 1) * ld];
  const ValueRows values = value_rows(job, block);
  PhiloxBlock random{};
  float sum = 0.0f;
  for (int64_t draw = 0; draw < samples; ++draw) {
    if (draw % 4 == 0) {
      counter.word[3] = static_cast<uint32_t>(draw / 4);
      random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
    }
    const uint32_t target = static_cast<uint32_t>((uint64_t{random.word[draw % 4]} * total) >> 32);
    int64_t low = 0, high = n - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (f[middle * ld] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const uint32_t own = f[low * ld] - (low ? f[(low - 1) * ld] : 0u);
    const float weight = params.control_variate ? p[low * ld] * static_cast<float>(total) /
                                                      (static_cast<float>(samples) * static_cast<float>(own))
                                                : 1.0f / static_cast<float>(samples);
    add_scaled(o, value_row(job, block, values, begin + low, scratch.keys), weight, params.v_head_size);
    sum += weight;
  }
  return sum;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
