// What the kernels on rows of probabilities share: reading, checking and writing a row, in float or double.
#pragma once

#include <algorithm>

#include "arena.h"
#include "elements.h"
#include "qexport/probability_rows.h"
#include "workers.h"

namespace qexport {
namespace QEXPORT_ISA {

// Row `row` of n numbers of `type`: where it lies, or in `buffer` of n + kLanes.
static inline const float* read_probabilities(DType type, const void* data, int64_t row, int64_t n, float* buffer) {
  const char* source = static_cast<const char*>(data) + row * n * bytes_of(type);
  if (type == DType::f32) return reinterpret_cast<const float*>(source);
  read_row(type, source, n, buffer);
  return buffer;
}
static inline const double* read_probabilities(DType, const void* data, int64_t row, int64_t n, double*) {
  return static_cast<const double*>(data) + row * n;
}

static inline void write_probabilities(DType type, const float* source, int64_t row, int64_t n, void* data) {
  write_row(type, source, n, static_cast<char*>(data) + row * n * bytes_of(type));
}
static inline void write_probabilities(DType, const double* source, int64_t row, int64_t n, void* data) {
  std::copy_n(source, n, static_cast<double*>(data) + row * n);
}

// No number below 0 or NaN, and a sum of one, or of zero.
template <class Real>
bool is_distribution(DType type, const Real* p, int64_t n) {
  constexpr int kParts = 8;
  double sum[kParts] = {};
  Real least[kParts] = {};
  int64_t j = 0;
  for (; j + kParts <= n; j += kParts) {
    for (int i = 0; i < kParts; ++i) {
      sum[i] += p[j + i];
      least[i] = p[j + i] < least[i] ? p[j + i] : least[i];
    }
  }
  for (; j < n; ++j) {
    sum[0] += p[j];
    least[0] = p[j] < least[0] ? p[j] : least[0];
  }
  double total = 0.0;
  bool negative = false;
  for (int i = 0; i < kParts; ++i) total += sum[i], negative = negative || least[i] < 0;
  const double off = total - 1.0;  // NaN where any number is
  return !negative && ((off <= sum_tolerance(type) && -off <= sum_tolerance(type)) || total == 0.0);
}

// The first of the rows that threads complain about.
class FirstRow {
 public:
  void note(int64_t row) {
    if (row < 0) return;
    int64_t first = first_.load();
    while (row < first && !first_.compare_exchange_weak(first, row)) {
    }
  }
  int64_t row() const { return first_.load() == INT64_MAX ? -1 : first_.load(); }

 private:
  std::atomic<int64_t> first_{INT64_MAX};
};

static inline char* aligned(char* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

}  // namespace QEXPORT_ISA
}  // namespace qexport
