// rho[r * stride + c] in two planes, real and imaginary parts. A map works on four elements at a time, those of the rows and
// columns that differ in one bit; a quadratic form reads the lower triangle, as its mirror image adds the same.
#include "density.h"
#include "kernels.h"
#include "simd.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

template <class Real>
constexpr int kWide = kLanes * 4 / static_cast<int>(sizeof(Real));
template <class Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kLanes * 4)));
};
template <class Real>
using V = typename VectorOf<Real>::type;

// Lane l of the result is lane l ^ S of x.
template <class Vector, int S, int... L>
QEXPORT_INLINE Vector swapped(Vector x, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, x, (L ^ S)...);
}
template <class Real, int S>
QEXPORT_INLINE V<Real> swapped(V<Real> x) {
  return swapped<V<Real>, S>(x, std::make_integer_sequence<int, kWide<Real>>{});
}

// Row `row` of a map, (4, 4) complex; in the lanes with bit S the row below it, which is that of the other column.
template <class Real, bool kComplex>
struct Coefficients {
  V<Real> re[4], im[kComplex ? 4 : 1];

  QEXPORT_INLINE void set(const double* map, int row, int S) {
    for (int i = 0; i < 4; ++i) {
      Real lanes[2][kWide<Real>];
      for (int lane = 0; lane < kWide<Real>; ++lane) {
        // A lane with the bit set holds column 1 of a pair, and finds column 0 in the other vector.
        const int set = lane & S ? 1 : 0;
        const double* element = map + 8 * (row + set) + 2 * (i ^ set);
        lanes[0][lane] = static_cast<Real>(element[0]), lanes[1][lane] = static_cast<Real>(element[1]);
      }
      re[i] = load<V<Real>>(lanes[0]);
      if constexpr (kComplex) im[i] = load<V<Real>>(lanes[1]);
    }
  }
};

// The elements 00, 01, 10, 11 of as many blocks as there are lanes.
template <class Real, bool kComplex>
struct Block {
  V<Real> re[4], im[kComplex ? 4 : 1];

  QEXPORT_INLINE void apply(const Coefficients<Real, kComplex>& c, V<Real>* to_re, V<Real>* to_im) const {
    V<Real> real = c.re[0] * re[0] + c.re[1] * re[1] + c.re[2] * re[2] + c.re[3] * re[3];
    if constexpr (kComplex) {
      real -= c.im[0] * im[0] + c.im[1] * im[1] + c.im[2] * im[2] + c.im[3] * im[3];
      *to_im = c.re[0] * im[0] + c.re[1] * im[1] + c.re[2] * im[2] + c.re[3] * im[3] + c.im[0] * re[0] + c.im[1] * re[1] +
               c.im[2] * re[2] + c.im[3] * re[3];
    }
    *to_re = real;
  }
};

// A map of a qubit whose bit is less than the lanes of a vector: both columns lie in one.
template <class Real, bool kComplex, int S>
void map_lanes(int64_t d, int64_t stride, const double* map, Real* re, Real* im) {
  Coefficients<Real, kComplex> upper, lower;
  upper.set(map, 0, S), lower.set(map, 2, S);
  for (int64_t r = 0; r < d; ++r) {
    if (r & S) continue;
    const int64_t top = r * stride, bottom = (r + S) * stride;
    for (int64_t c = 0; c < d; c += kWide<Real>) {
      Block<Real, kComplex> block;
      const auto read = [&](const Real* plane, V<Real>* to) QEXPORT_INLINE_LAMBDA {
        to[0] = load<V<Real>>(plane + top + c), to[2] = load<V<Real>>(plane + bottom + c);
        to[1] = swapped<Real, S>(to[0]), to[3] = swapped<Real, S>(to[2]);
      };
      read(re, block.re);
      if constexpr (kComplex) read(im, block.im);
      V<Real> above_im, below_im, above, below;
      block.apply(upper, &above, &above_im);
      block.apply(lower, &below, &below_im);
      store(re + top + c, above), store(re + bottom + c, below);
      if constexpr (kComplex) store(im + top + c, above_im), store(im + bottom + c, below_im);
    }
  }
}

// A map of any other qubit.
template <class Real, bool kComplex>
void map_columns(int64_t d, int64_t stride, int64_t bit, const double* map, Real* re, Real* im) {
  Coefficients<Real, kComplex> rows[4];
  for (int i = 0; i < 4; ++i) rows[i].set(map, i, 0);
  for (int64_t r = 0; r < d; ++r) {
    if (r & bit) continue;
    for (int64_t begin = 0; begin < d; begin += 2 * bit) {
      for (int64_t c = begin; c < begin + bit; c += kWide<Real>) {
        const int64_t at[4] = {r * stride + c, r * stride + c + bit, (r + bit) * stride + c, (r + bit) * stride + c + bit};
        Block<Real, kComplex> block;
        for (int i = 0; i < 4; ++i) block.re[i] = load<V<Real>>(re + at[i]);
        if constexpr (kComplex) {
          for (int i = 0; i < 4; ++i) block.im[i] = load<V<Real>>(im + at[i]);
        }
        for (int i = 0; i < 4; ++i) {
          V<Real> to_re, to_im;
          block.apply(rows[i], &to_re, &to_im);
          store(re + at[i], to_re);
          if constexpr (kComplex) store(im + at[i], to_im);
        }
      }
    }
  }
}

template <class Real, bool kComplex>
void evolve_as(int qubits, const double* maps, const Real* state, Real* re, Real* im) {
  const int64_t d = int64_t{1} << qubits, stride = density_stride(d);
  for (int64_t r = 0; r < d; ++r) {
    for (int64_t c = 0; c < d; c += kWide<Real>) {
      store(re + r * stride + c, load<V<Real>>(state + c) * state[r]);
      if constexpr (kComplex) store(im + r * stride + c, V<Real>{});
    }
  }
  for (int k = 0; k < qubits; ++k) {
    const int64_t bit = int64_t{1} << k;
    const double* map = maps + 32 * k;
    if (bit >= kWide<Real>) {
      map_columns<Real, kComplex>(d, stride, bit, map, re, im);
    } else if (bit == 1) {
      map_lanes<Real, kComplex, 1>(d, stride, map, re, im);
    } else if (bit == 2) {
      if constexpr (kWide<Real> > 2) map_lanes<Real, kComplex, 2>(d, stride, map, re, im);
    } else if (bit == 4) {
      if constexpr (kWide<Real> > 4) map_lanes<Real, kComplex, 4>(d, stride, map, re, im);
    } else {
      if constexpr (kWide<Real> > 8) map_lanes<Real, kComplex, 8>(d, stride, map, re, im);
    }
  }
}

template <class Real>
void evolve(int qubits, const double* maps, const Real* state, Real* re, Real* im) {
  return im ? evolve_as<Real, true>(qubits, maps, state, re, im) : evolve_as<Real, false>(qubits, maps, state, re, nullptr);
}

// Rows of rho whose products with a panel are summed at once: with two vectors of states each, what the registers hold.
constexpr int kRows = kLanes == 16 ? 8 : 4;

// z_c += sum over r in [begin, end) of rho[c, r] v_r, for kCount rows c from `row` on.
template <class Real, int kCount, bool kComplex>
QEXPORT_INLINE void products(int64_t begin, int64_t end, int64_t stride, const Real* re, const Real* im, const Real* v_re,
                             const Real* v_im, V<Real> (&z_re)[kCount][2], V<Real> (&z_im)[kCount][2]) {
  constexpr int kWidth = 2 * kWide<Real>;
  for (int64_t r = begin; r < end; ++r) {
    const V<Real> a[2] = {load<V<Real>>(v_re + r * kWidth), load<V<Real>>(v_re + r * kWidth + kWide<Real>)};
    V<Real> b[2] = {};
    if constexpr (kComplex) {
      b[0] = load<V<Real>>(v_im + r * kWidth), b[1] = load<V<Real>>(v_im + r * kWidth + kWide<Real>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Real x = re[i * stride + r];
      for (int h = 0; h < 2; ++h) z_re[i][h] += x * a[h];
      if constexpr (kComplex) {
        const Real y = im[i * stride + r];
        for (int h = 0; h < 2; ++h) {
          z_re[i][h] -= y * b[h];
          z_im[i][h] += x * b[h];
          z_im[i][h] += y * a[h];
        }
      }
    }
  }
}

template <class Real, int kCount, bool kComplex>
void add_forms(int64_t d, const Real* re, const Real* im, const Real* v_re, const Real* v_im, Real* out) {
  constexpr int kWidth = 2 * kWide<Real>;
  const int64_t stride = density_stride(d);
  V<Real> sum[2] = {load<V<Real>>(out), load<V<Real>>(out + kWide<Real>)};
  for (int64_t row = 0; row < d; row += kCount) {
    V<Real> z_re[kCount][2] = {}, z_im[kCount][2] = {};
    const Real* from_re = re + row * stride;
    const Real* from_im = kComplex ? im + row * stride : nullptr;
    products<Real, kCount, kComplex>(0, row, stride, from_re, from_im, v_re, v_im, z_re, z_im);
    for (int i = 0; i < kCount; ++i) {
      for (int h = 0; h < 2; ++h) z_re[i][h] += z_re[i][h], z_im[i][h] += z_im[i][h];
    }
    products<Real, kCount, kComplex>(row, row + kCount, stride, from_re, from_im, v_re, v_im, z_re, z_im);
    for (int i = 0; i < kCount; ++i) {
      for (int h = 0; h < 2; ++h) {
        const int64_t place = (row + i) * kWidth + h * kWide<Real>;
        sum[h] += z_re[i][h] * load<V<Real>>(v_re + place);
        if constexpr (kComplex) sum[h] += z_im[i][h] * load<V<Real>>(v_im + place);
      }
    }
  }
  store(out, sum[0]), store(out + kWide<Real>, sum[1]);
}

template <class Real, int kCount, bool kComplex>
void forms_of(int64_t d, const Real* re, const Real* im, const Real* v_re, const Real* v_im, Real* out) {
  if (d >= kCount) return add_forms<Real, kCount, kComplex>(d, re, im, v_re, v_im, out);
  return add_forms<Real, 2, kComplex>(d, re, im, v_re, v_im, out);
}

template <class Real>
void forms(int64_t d, const Real* re, const Real* im, const Real* panel_re, const Real* panel_im, Real* out) {
  for (int s = 0; s < 2 * kWide<Real>; ++s) out[s] = 0;
  if (im && panel_im) return forms_of<Real, kRows / 2, true>(d, re, im, panel_re, panel_im, out);
  forms_of<Real, kRows, false>(d, re, nullptr, panel_re, nullptr, out);
  if (panel_im) forms_of<Real, kRows, false>(d, re, nullptr, panel_im, nullptr, out);
}

}  // namespace

extern const DensityKernels<float> density_f32;
extern const DensityKernels<double> density_f64;
const DensityKernels<float> density_f32 = {2 * kWide<float>, evolve<float>, forms<float>};
const DensityKernels<double> density_f64 = {2 * kWide<double>, evolve<double>, forms<double>};

}  // namespace QEXPORT_ISA
}  // namespace qexport
