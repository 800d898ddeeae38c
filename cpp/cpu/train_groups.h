// Products of matrices in float or double, and the groups of a train, which are made by them.
#pragma once

#include <algorithm>

#include "arena.h"
#include "elements.h"
#include "qexport/mps_product.h"
#include "row_blocks.h"
#include "workers.h"

namespace qexport {
namespace QEXPORT_ISA {

template <class Real>
struct Wide {
  static constexpr int lanes = kLanes * 4 / static_cast<int>(sizeof(Real));
  static constexpr int panel = 2 * lanes;  // columns of a register block
  typedef Real type __attribute__((vector_size(kLanes * 4)));
};

constexpr int64_t kDepth = 512;     // so many rows of a right operand's panel are used again from the cache
constexpr int64_t kRowChunk = 128;  // likewise of the left operand
constexpr int64_t kSerialProducts = int64_t{1} << 18;  // multiply-adds below which waking a pool costs as much

// c[b][v] (+)= sum_{i < n} a[b * stride + i * step] * rhs[i][v], for kRows rows and kVecs vectors.
template <class Real, int kVecs, int kRows>
static QEXPORT_INLINE void multiply_tile(const Real* a, int64_t stride, int64_t step, const Real* rhs, int64_t ld, Real* c,
                                         int64_t ldc, int64_t n, bool add) {
  typedef typename Wide<Real>::type Vector;
  constexpr int kWidth = Wide<Real>::lanes;
  constexpr int kChains = kRows < 4 ? 4 / kRows : 1;  // so many sums of each number, which do not wait for each other
  Vector sum[kRows][kVecs] = {}, more[kChains > 1 ? (kChains - 1) * kRows : 1][kVecs] = {};
  if (add) {
    for (int b = 0; b < kRows; ++b) {
      for (int v = 0; v < kVecs; ++v) sum[b][v] = load<Vector>(c + b * ldc + v * kWidth);
    }
  }
  const auto add_products = [&](const Real* left, const Real* right, Vector(*to)[kVecs]) QEXPORT_INLINE_LAMBDA {
    Vector r[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) r[v] = load<Vector>(right + v * kWidth);
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) {
      const Real x = left[b * stride];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) to[b][v] += r[v] * x;
    }
  };
  int64_t i = 0;
  if constexpr (kChains > 1) {
    for (; i + kChains <= n; i += kChains, a += kChains * step, rhs += kChains * ld) {
      add_products(a, rhs, sum);
#pragma GCC unroll 3
      for (int k = 1; k < kChains; ++k) add_products(a + k * step, rhs + k * ld, more + (k - 1) * kRows);
    }
#pragma GCC unroll 3
    for (int b = 0; b < (kChains - 1) * kRows; ++b) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[b % kRows][v] += more[b][v];
    }
  }
  for (; i < n; ++i, a += step, rhs += ld) add_products(a, rhs, sum);
#pragma GCC unroll 8
  for (int b = 0; b < kRows; ++b, c = next_row(c, ldc)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(c + v * kWidth, sum[b][v]);
  }
}

template <class Real, int kVecs>
static __attribute__((noinline, noclone)) void multiply_panel(const Real* a, int64_t stride, int64_t step, const Real* rhs,
                                                              int64_t ld, Real* c, int64_t ldc, int64_t n, int64_t rows,
                                                              bool add) {
  for_row_blocks(rows, [&](int64_t b, auto count) QEXPORT_INLINE_LAMBDA {
    multiply_tile<Real, kVecs, decltype(count)::value>(a + b * stride, stride, step, rhs, ld, c + b * ldc, ldc, n, add);
  });
}

// c (rows, width) = a (rows, n) rhs (n, width): element (b, i) of a is a[b * stride + i * step], rows of rhs and c are ld
// and ldc numbers apart. Whole vectors of rhs are read, also where its last row ends within one; c is written exactly.
template <class Real>
static void multiply(const Real* a, int64_t stride, int64_t step, const Real* rhs, int64_t ld, Real* c, int64_t ldc,
                     int64_t n, int64_t rows, int64_t width) {
  constexpr int64_t kWidth = Wide<Real>::lanes, kPanel = Wide<Real>::panel;
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t first = 0; first < rows; first += kRowChunk) {
    const int64_t count = std::min(kRowChunk, rows - first);
    const Real* from = a + first * stride;
    Real* to = c + first * ldc;
    for (int64_t i = 0; i < n || i == 0; i += kDepth) {
      const int64_t depth = std::min(kDepth, n - i);
      const Real* left = from + i * step;
      int64_t at = 0;
      for (; at + kPanel <= whole; at += kPanel) {
        multiply_panel<Real, 2>(left, stride, step, rhs + i * ld + at, ld, to + at, ldc, depth, count, i > 0);
      }
      if (at < whole) {
        multiply_panel<Real, 1>(left, stride, step, rhs + i * ld + at, ld, to + at, ldc, depth, count, i > 0);
      }
    }
    if (whole == width) continue;
    Real edge[kRowChunk * kWidth];
    multiply_panel<Real, 1>(from, stride, step, rhs + whole, ld, edge, kWidth, n, count, false);
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t j = whole; j < width; ++j) to[b * ldc + j] = edge[b * kWidth + j - whole];
    }
  }
}

// n elements of `type` as Real.
static inline void read_numbers(DType type, const char* src, int64_t n, float* dst) {
  constexpr int64_t kStep = kLanes;
  const int64_t whole = n / kStep * kStep;
  read_row(type, src, whole, dst);
  if (whole == n) return;
  float rest[kLanes];
  store(rest, load_part(type, src + whole * bytes_of(type), n - whole));
  std::copy_n(rest, n - whole, dst + whole);
}
static inline void read_numbers(DType, const char* src, int64_t n, double* dst) {
  std::copy_n(reinterpret_cast<const double*>(src), n, dst);
}

// n numbers, readable up to a whole vector, in `type`.
static inline void write_numbers(DType type, const float* src, int64_t n, char* dst) { write_row(type, src, n, dst); }
static inline void write_numbers(DType, const double* src, int64_t n, char* dst) {
  std::copy_n(src, n, reinterpret_cast<double*>(dst));
}

template <class Real>
constexpr bool is_native(DType type) {
  return type == (sizeof(Real) == 8 ? DType::f64 : DType::f32);
}

// A core, (left, r, c, right) row-major.
template <class Real>
struct Core {
  const Real* data;
  int64_t left, r, c, right;
  int64_t numbers() const { return left * r * c * right; }
};

// Core of the sites [begin, end), without its numbers.
template <class Real>
static inline Core<Real> shape_of(const MpsLayout& l, int64_t begin, int64_t end) {
  Core<Real> core{nullptr, l.bonds[begin], 1, 1, l.bonds[end]};
  for (int64_t k = begin; k < end; ++k) core.r *= l.row_factors[k], core.c *= l.col_factors[k];
  return core;
}
template <class Real>
static inline Core<Real> group_shape(const MpsLayout& l, const MpsGroups& groups, int64_t g) {
  return shape_of<Real>(l, g == 0 ? 0 : groups.ends[g - 1], groups.ends[g]);
}

// Makes the cores of groups from those of their sites, in the memory of an arena. One that only counts gives no numbers.
template <class Real>
class GroupMaker {
 public:
  // `cores` are the numbers of the train in `type`.
  GroupMaker(const MpsLayout& layout, DType type, const void* cores, Arena& arena) : l_(layout), arena_(arena) {
    int64_t numbers = 0;
    for (int64_t k = 0; k < l_.sites; ++k) numbers += shape_of<Real>(l_, k, k + 1).numbers();
    numbers_ = arena.take<Real>(numbers + Wide<Real>::panel);
    if (numbers_ && cores) read_numbers(type, static_cast<const char*>(cores), numbers, numbers_);
  }

  // The cores of all groups.
  const Core<Real>* make_all(const MpsGroups& groups, const ParallelFor& parallel) {
    Core<Real>* made = arena_.take<Core<Real>>(groups.count);
    for (int64_t g = 0; g < groups.count; ++g) {
      const Core<Real> core = make(g == 0 ? 0 : groups.ends[g - 1], groups.ends[g], parallel);
      if (made) made[g] = core;
    }
    return made;
  }

  // The core of the sites [begin, end).
  Core<Real> make(int64_t begin, int64_t end, const ParallelFor& parallel) {
    Core<Real> core = shape_of<Real>(l_, begin, end);
    if (end - begin > 1) return merge(begin, end, arena_.take<Real>(core.numbers() + Wide<Real>::panel), parallel);
    core.data = numbers_;
    for (int64_t k = 0; numbers_ && k < begin; ++k) core.data += shape_of<Real>(l_, k, k + 1).numbers();
    return core;
  }

  // The core of more than one site, from those of two halves, each of which has about the square root of its numbers and is
  // gone afterwards.
  Core<Real> merge(int64_t begin, int64_t end, Real* result, const ParallelFor& parallel) {
    const size_t used = arena_.used;
    const int64_t middle = split_sites(begin, end, [&](int64_t k) {
      return std::max(shape_of<Real>(l_, begin, k).numbers(), shape_of<Real>(l_, k, end).numbers());
    });
    const Core<Real> left = make(begin, middle, parallel), right = make(middle, end, parallel);
    if (numbers_) combine(left, right, result, parallel);
    most_ = std::max(most_, arena_.used);
    arena_.used = used;
    Core<Real> core = shape_of<Real>(l_, begin, end);
    core.data = result;
    return core;
  }

  // Bytes of the arena that were in use at once.
  size_t most() const { return std::max(most_, arena_.used); }

 private:
  // result[a, (I, i), (J, j), b] = sum_x p[a, I, J, x] q[x, i, j, b], in one product for all rows (a, I, J) where q has
  // no row index, else in one for each row (a, I).
  static void combine(const Core<Real>& p, const Core<Real>& q, Real* result, const ParallelFor& parallel) {
    const int64_t n = p.right, width = q.c * q.right, rows = p.left * p.r;
    const bool joined = q.r == 1 || (p.c == 1 && q.c == 1);
    const int64_t step = joined ? 16 : 1;
    const bool serial = rows * p.c * n * q.r * width < kSerialProducts;
    for_each_piece(
        (rows + step - 1) / step, serial ? 1 : parallel.max_threads, nullptr, 0, parallel, [&](int64_t piece, char*) {
          const int64_t first = piece * step, count = std::min(step, rows - first);
          const Real* from = p.data + first * p.c * n;
          Real* to = result + first * p.c * q.r * width;
          if (joined) {
            multiply(from, n, int64_t{1}, q.data, q.r * width, to, q.r * width, n, count * p.c, q.r * width);
            return;
          }
          for (int64_t i = 0; i < q.r; ++i) {
            multiply(from, n, int64_t{1}, q.data + i * width, q.r * width, to + i * p.c * width, width, n, p.c, width);
          }
        });
  }

  const MpsLayout& l_;
  Arena& arena_;
  Real* numbers_;
  size_t most_ = 0;
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
