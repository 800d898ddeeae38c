// Compiled once per instruction set, as row_kernels.cc: the Viterbi algorithm on the trellis of a shift register.
//
// A state is what of a window the next one keeps, its low kTrellisWindow - bits bits. Window w = (top << S) | q, S bits in
// q, comes from state w >> bits and leads to state q: the best way to q is the best of 2^bits windows that differ in their
// top.
#include "simd.h"
#include "trellis.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

constexpr int kWindows = 1 << kTrellisWindow;
constexpr int kAtOnce = 4;  // vectors of states: one would wait for its own comparison

// cost[] of the states behind one number more, and in chosen[] the top of the best window that leads to each.
template <int bits>
void step(float value, const float* table, const float* cost, float* expanded, float* next, uint8_t* chosen) {
  constexpr int states = kWindows >> bits, tops = 1 << bits;
  for (int state = 0; state < states; ++state) {
    const float known = cost[state];
    float* to = expanded + state * tops;
    for (int symbol = 0; symbol < tops; ++symbol) to[symbol] = known;
  }
  const bool free = value != value;
  const vf wanted = vf{} + (free ? 0.0f : value), counts = vf{} + (free ? 0.0f : 1.0f);
  for (int q = 0; q < states; q += kAtOnce * kLanes) {
    vf best[kAtOnce];
    vi best_top[kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) {
      best[v] = vf{} + kInf;
      best_top[v] = vi{};
    }
    for (int top = 0; top < tops; ++top) {
      for (int v = 0; v < kAtOnce; ++v) {
        const int window = top * states + q + v * kLanes;
        const vf off = (wanted - load<vf>(table + window)) * counts;
        const vf sum = load<vf>(expanded + window) + off * off;
        const vi less = sum < best[v];
        best[v] = less ? sum : best[v];
        best_top[v] = less ? vi{} + top : best_top[v];
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      store(next + q + v * kLanes, best[v]);
      for (int lane = 0; lane < kLanes; ++lane) chosen[q + v * kLanes + lane] = static_cast<uint8_t>(best_top[v][lane]);
    }
  }
}

template <int bits>
void encode(const TrellisParams& p, const float* values, const float* table, uint16_t* windows, char* scratch) {
  constexpr int states = kWindows >> bits;
  float* expanded = reinterpret_cast<float*>(scratch);
  float* cost = expanded + kWindows;
  float* next = cost + states;
  uint8_t* chosen = reinterpret_cast<uint8_t*>(cost + 2 * states);
  int start = 0;
  for (int64_t begin = 0; begin < p.columns; begin += kTrellisStretch) {
    const int64_t count = lesser(p.columns - begin, kTrellisStretch);
    for (int state = 0; state < states; ++state) cost[state] = kInf;
    cost[start] = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      step<bits>(values[begin + i], table, cost, expanded, next, chosen + i * states);
      float* last = cost;
      cost = next;
      next = last;
    }
    int state = 0;
    for (int other = 1; other < states; ++other) state = cost[other] < cost[state] ? other : state;
    start = state;
    for (int64_t i = count - 1; i >= 0; --i) {
      const int window = chosen[i * states + state] * states + state;
      windows[begin + i] = static_cast<uint16_t>(window);
      state = window >> bits;
    }
  }
}

void encode_row(const TrellisParams& p, const float* values, const float* table, uint16_t* windows, char* scratch) {
  constexpr decltype(&encode<1>) by_bits[] = {encode<1>, encode<2>, encode<3>, encode<4>, encode<5>, encode<6>};
  by_bits[p.bits - 1](p, values, table, windows, scratch);
}

}  // namespace

extern const TrellisKernels trellis_kernels;
const TrellisKernels trellis_kernels = {encode_row};

}  // namespace QEXPORT_ISA
}  // namespace qexport
