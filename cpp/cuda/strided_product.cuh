// Products of matrices whose rows and columns are made of digits, so that a train times a matrix sorts nothing in memory.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

// One digit of an index: what a step of it adds to the address, in elements, and to the coordinates that limits are about.
struct Digit {
  int64_t size, step, row, column;
  uint64_t inverse;  // (2^64 - 1) / size
};

// Numbers 0 to count - 1 in mixed radix; digits[0] runs fastest, and the last digit takes what is left.
struct Index {
  static constexpr int kDigits = 3;
  int64_t count;
  int digits_used;
  Digit digits[kDigits];
};

// Of a float type.
__host__ __device__ __forceinline__ int64_t bytes_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

constexpr int64_t kNoLimit = int64_t{1} << 61;

// Element (i, j) of matrix b of a batch lies at b * batch + the steps of i and j. Elements whose row or column coordinate
// reaches its limit are zeros that lie nowhere: they are neither read nor written.
struct Strided {
  const void* data;
  DType type;  // f64, or one of the others, which are float in registers
  int64_t batch;
  Index i, j;
  int64_t rows, columns;  // the limits
};

// C = A B + bias for each matrix of a batch; i of A and C, j of A and i of B, j of B and C count alike.
struct Product {
  DType type;  // of the call's tensors: what is exact enough for them
  int64_t batch;
  Strided a, b, c;
  const void* bias;  // of C's type, by the column coordinate; or null
};

Digit digit(int64_t size, int64_t step, int64_t row = 0, int64_t column = 0);
Index index_of(const Digit& only);
Index index_of(const Digit& fast, const Digit& slow);
Index index_of(const Digit& fast, const Digit& middle, const Digit& slow);

// How a product is cut into tiles: from type and shapes alone, the same on every device, so that results and scratch are
// too.
struct Tiling {
  bool wide;           // tiles of 128 x 128, else 64 x 64
  int64_t splits;      // parts of the depth, summed in a second pass
  double nanoseconds;  // estimated
  int64_t partials;    // numbers in the parts, float or double
};
Tiling choose_tiling(DType type, int64_t batch, int64_t m, int64_t n, int64_t k);

// `partials` is room for as many numbers as the tiling says.
void multiply(Status& status, const Product& product, void* partials, void* stream);

// Elements of any of the float types.
template <class Real>
struct alignas(16) Quad {
  Real x[4];
};

__device__ __forceinline__ void read_one(DType type, const void* data, int64_t at, float& x) {
  if (type == DType::f32) {
    x = static_cast<const float*>(data)[at];
  } else if (type == DType::f16) {
    x = to_float(static_cast<const __half*>(data)[at]);
  } else {
    x = to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  }
}
__device__ __forceinline__ void read_one(DType, const void* data, int64_t at, double& x) {
  x = static_cast<const double*>(data)[at];
}
__device__ __forceinline__ void write_one(DType type, void* data, int64_t at, float x) {
  if (type == DType::f32) {
    static_cast<float*>(data)[at] = x;
  } else if (type == DType::f16) {
    static_cast<__half*>(data)[at] = from_float<__half>(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(x);
  }
}
__device__ __forceinline__ void write_one(DType, void* data, int64_t at, double x) { static_cast<double*>(data)[at] = x; }

// Quotients of numbers >= 0, by the short division where both are short.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

struct Place {
  int64_t at, row, column;
};
__device__ __forceinline__ Place operator+(const Place& a, const Place& b) {
  return {a.at + b.at, a.row + b.row, a.column + b.column};
}
__device__ __forceinline__ Place locate(const Index& index, int64_t i) {
  Place place{0, 0, 0};
#pragma unroll 1
  for (int d = 0; d < index.digits_used; ++d) {
    const Digit& digit = index.digits[d];
    int64_t rest = 0, x = i;
    if (d + 1 < index.digits_used) {  // what the inverse leaves out is less than 1
      rest = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(i), digit.inverse));
      x -= rest * digit.size;
      if (x >= digit.size) x -= digit.size, ++rest;
    }
    place.at += x * digit.step, place.row += x * digit.row, place.column += x * digit.column;
    i = rest;
  }
  return place;
}

}  // namespace cuda
}  // namespace qexport
