// What this processor can do at most: multiply-adds from registers, and reading memory.
#pragma once

#include <thread>
#include <vector>

#include "harness.h"
#include "tiles.h"

namespace qexport {
namespace QEXPORT_ISA {

// kChains independent accumulators hide the latency of the operation; `step` is one multiply-add of a vector.
template <class V, class Step>
static double operations_per_second(double per_step, Step step) {
  constexpr int kChains = 20, kSteps = 2000;
  V acc[kChains] = {};
  const double t = micro::time_of([&] {
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 20
      for (int c = 0; c < kChains; ++c) acc[c] = step(acc[c]);
    }
    micro::keep(acc);
  });
  return per_step * kChains * kSteps / t;
}

// Bytes per second of `threads` threads that add up an array far larger than any cache.
static double read_bandwidth(int threads) {
  constexpr size_t kFloats = size_t{64} << 20;  // 256 MiB
  const std::vector<float> data(kFloats, 1.0f);
  const auto sum = [&](size_t begin, size_t end) {
    vf acc[8] = {};
    for (size_t i = begin; i < end; i += 8 * kLanes) {
      for (int u = 0; u < 8; ++u) acc[u] += load<vf>(data.data() + i + static_cast<size_t>(u * kLanes));
    }
    micro::keep(acc);
  };
  const size_t part = kFloats / static_cast<size_t>(threads) / 1024 * 1024;
  const double t = micro::time_of([&] {
    std::vector<std::thread> others;
    for (int w = 1; w < threads; ++w)
      others.emplace_back(sum, part * static_cast<size_t>(w), part * static_cast<size_t>(w + 1));
    sum(0, part);
    for (std::thread& thread : others) thread.join();
  });
  return static_cast<double>(part) * threads * sizeof(float) / t;
}

static void peaks() {
  micro::peak("clock_ghz", 1e-9 * micro::clock_hz());
  vf a = splat(0.5f), b = splat(1.0f);
  __asm__ volatile("" : "+m"(a), "+m"(b));  // not constants
  micro::peak("fp32_gflops", 1e-9 * operations_per_second<vf>(2.0 * kLanes, [a, b](vf x) { return x * a + b; }));
#if defined(QEXPORT_TILES)
  const TileRegisters registers;  // all zero
  micro::peak("bf16_gflops", 1e-9 * operations_per_second<vf>(2.0 * 16 * 16 * 32, [](vf x) {
                               tile_product<0, kWideA, kWideB>();
                               return x;
                             }));
#elif defined(__AVX512BF16__)
  const __m512bh h = (__m512bh)a;
  micro::peak("bf16_gflops", 1e-9 * operations_per_second<__m512>(64, [h](__m512 x) { return _mm512_dpbf16_ps(x, h, h); }));
#endif
#if defined(__AVX512VNNI__)
  const __m512i i8 = (__m512i)a;
  micro::peak("int8_gops",
              1e-9 * operations_per_second<__m512i>(128, [i8](__m512i x) { return _mm512_dpbusd_epi32(x, i8, i8); }));
#endif
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  for (int threads = 1; threads <= cores; threads *= 2) {
    char name[32];
    std::snprintf(name, sizeof name, "read_gb_per_s %d", threads);
    micro::peak(name, 1e-9 * read_bandwidth(threads));
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
