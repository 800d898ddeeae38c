// Times a function and prints a line of JSON: name, nanoseconds and core cycles per unit of work.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

namespace micro {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of one call: the best of 15 spells of at least 3 ms, since whatever disturbs one makes it slower.
template <class F>
double time_of(F&& call) {
  call();
  int64_t calls = 1;
  for (;; calls *= 2) {
    const double start = seconds();
    for (int64_t i = 0; i < calls; ++i) call();
    if (seconds() - start > 3e-3) break;
  }
  double best = 1e300;
  for (int spell = 0; spell < 15; ++spell) {
    const double start = seconds();
    for (int64_t i = 0; i < calls; ++i) call();
    best = std::min(best, (seconds() - start) / static_cast<double>(calls));
  }
  return best;
}

// kLinks additions, each of which waits for the one before: one cycle a link.
constexpr int kLinks = 4096;
inline void chain_of_additions() {
  int64_t x = 0, one = 1;
  __asm__ volatile("" : "+r"(one));
#pragma GCC unroll 64
  for (int link = 0; link < kLinks; ++link) {
    x += one;
    __asm__ volatile("" : "+r"(x));
  }
}

// Cycles per second of the core as it runs now.
inline double clock_hz() {
  static const double hz = kLinks / time_of(chain_of_additions);
  return hz;
}

// The work of one call is `units` of `unit`.
template <class F>
void measure(const char* name, const char* unit, double units, F&& call) {
  const double t = time_of(call) / units;
  std::printf("{\"name\": \"%s\", \"unit\": \"%s\", \"ns\": %.6g, \"cycles\": %.6g}\n", name, unit, 1e9 * t, t * clock_hz());
}

inline void peak(const char* name, double value) { std::printf("{\"peak\": \"%s\", \"value\": %.6g}\n", name, value); }

// The compiler must believe that someone reads what `p` points to.
inline void keep(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

}  // namespace micro
