// Products of a warp on matrix units: "mma.m16n8k16" and "mma.m16n8k8" of the PTX manual say which lane holds which
// elements.
#include <cmath>

#include "emulation.h"

namespace emulation {

namespace {

template <class Number, int kDepth>
struct Matrices {
  Number a[16][kDepth], b[kDepth][8], c[16][8];

  // The four accumulators of a lane: two rows, two columns.
  Number& sum(int lane, int i) { return c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]; }
  void multiply() {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
      }
    }
  }
};

template <class T>
void multiply_16816(const Slot* lanes) {
  Matrices<float, 16> all;
  for (int lane = 0; lane < 32; ++lane) {
    const auto own = from_slot<Fragments>(lanes[lane]);
    for (int e = 0; e < 2; ++e) {
      const int k = lane % 4 * 2 + e;
      for (int i = 0; i < 4; ++i) all.a[lane / 4 + i % 2 * 8][k + i / 2 * 8] = qexport::cuda::half_at<T>(own.a[i], e);
      for (int i = 0; i < 2; ++i) all.b[k + i * 8][lane / 4] = qexport::cuda::half_at<T>(own.b[i], e);
    }
    for (int i = 0; i < 4; ++i) all.sum(lane, i) = own.c[i];
  }
  all.multiply();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) from_slot<Fragments>(lanes[lane]).c[i] = all.sum(lane, i);
  }
}

double tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }
float towards_zero(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

void multiply_half(const Slot* lanes) { multiply_16816<__half>(lanes); }
void multiply_bfloat16(const Slot* lanes) { multiply_16816<__nv_bfloat16>(lanes); }

// What a unit drops, of its operands and of its sums.
void multiply_tf32(const Slot* lanes) {
  Matrices<double, 8> all;
  for (int lane = 0; lane < 32; ++lane) {
    const auto own = from_slot<Fragments>(lanes[lane]);
    const int k = lane % 4;
    for (int i = 0; i < 4; ++i) all.a[lane / 4 + i % 2 * 8][k + i / 2 * 4] = tf32(own.a[i]);
    for (int i = 0; i < 2; ++i) all.b[k + i * 4][lane / 4] = tf32(own.b[i]);
    for (int i = 0; i < 4; ++i) all.sum(lane, i) = own.c[i];
  }
  all.multiply();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) from_slot<Fragments>(lanes[lane]).c[i] = towards_zero(all.sum(lane, i));
  }
}

}  // namespace emulation
