// Vectors of kLanes floats, written with the GCC/Clang vector extensions so that one source serves every instruction set.
// Everything lives in the namespace QEXPORT_ISA: no symbol is shared between files compiled with different flags, and
// nothing of the standard library is called.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
// GCC 12 warns about its own undefined-vector intrinsics where they are inlined.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace qexport {
namespace QEXPORT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kBlock = 8;  // broadcast operands of a register block; two vectors of queries each
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kBlock = 6;
#else
constexpr int kLanes = 4;
constexpr int kBlock = 8;
#endif

#define QEXPORT_INLINE inline __attribute__((always_inline))
#define QEXPORT_INLINE_LAMBDA __attribute__((always_inline))

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = __builtin_inff();
constexpr float kLargest = 3.402823466e+38f;  // finite

template <class T>
static QEXPORT_INLINE T lesser(T a, T b) {
  return a < b ? a : b;
}
template <class T>
static QEXPORT_INLINE T greater(T a, T b) {
  return a > b ? a : b;
}

template <class V, class T>
static QEXPORT_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
static QEXPORT_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
static QEXPORT_INLINE vf splat(float x) { return x - vf{}; }
static QEXPORT_INLINE vi splat(int32_t x) { return x - vi{}; }
static QEXPORT_INLINE vu bits_of(vf x) { return (vu)x; }
static QEXPORT_INLINE vf float_of(vu x) { return (vf)x; }
static QEXPORT_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
static QEXPORT_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// a > b ? a : b, so that a NaN in `a` is dropped.
static QEXPORT_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Bit l of the result is set where lane l of a comparison is true.
static QEXPORT_INLINE uint32_t lane_bits(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(mask[l] & 1) << l;
  return bits;
#endif
}

static QEXPORT_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Writes the lanes of x that are set in `bits` one after the other; may write kLanes elements.
static QEXPORT_INLINE void store_compressed(int32_t* dst, uint32_t bits, vi x) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(dst, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)x));
#else
  for (; bits; bits &= bits - 1) *dst++ = x[__builtin_ctz(bits)];
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

// 1 / x to about 1 ulp, for x and 1 / x that are normal numbers; 0 and infinite x give NaN.
static QEXPORT_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  // A division takes as long as 16 multiplications. An estimate to 14 bits and a step of Newton's method, which doubles
  // them.
  const vf estimate = (vf)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// 2^y for y < 127, to about 1 ulp near 0; 0 for -inf and where float32 runs out; NaN stays NaN.
// 2^r is its degree-5 polynomial of least relative error (7.5e-8) on the interval of r.
static QEXPORT_INLINE vf exp2(vf y) {
#if defined(__AVX512F__)
  // y = floor(y) + r, r in [0, 1); scalef multiplies by 2^floor(y) and turns -inf into 0.
  const vf r = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf poly = splat(1.8775766734e-03f);
  poly = poly * r + 8.9893400947e-03f;
  poly = poly * r + 5.5826318050e-02f;
  poly = poly * r + 2.4015361705e-01f;
  poly = poly * r + 6.9315307320e-01f;
  poly = poly * r + 9.9999992506e-01f;
  // maskz: the plain form's undefined source is a false "used uninitialized" in GCC 12.
  return (vf)_mm512_maskz_scalef_ps(0xFFFF, (__m512)poly, (__m512)y);
#else
  // y = n + r, |r| <= 1/2, n an integer; 2^n through the exponent bits.
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const vf shifted = y + kRound;
  const vf r = y - (shifted - kRound);
  vf poly = splat(1.3276471979e-03f);
  poly = poly * r + 9.6755413342e-03f;
  poly = poly * r + 5.5507132735e-02f;
  poly = poly * r + 2.4022119724e-01f;
  poly = poly * r + 6.9314696706e-01f;
  poly = poly * r + 1.0000000717f;
  const vf power = float_of((bits_of(shifted) << 23) + 0x3F800000u);
  return y < -125.0f ? vf{} : poly * power;
#endif
}

static QEXPORT_INLINE vf exp_nonpositive(vf x) { return exp2(x * kLog2E); }

// tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|). Near 0, where 1 - e has lost its digits, x times the polynomial
// of x^2 of least relative error (1.3e-8): a softcap far above all scores must leave them as they are.
static QEXPORT_INLINE vf tanh(vf x) {
  const vu sign = bits_of(x) & 0x80000000u;
  const vf e = exp_nonpositive(float_of(bits_of(x) | 0x80000000u) * 2.0f);
  const vf large = float_of(bits_of((1.0f - e) / (1.0f + e)) | sign);
  const vf square = x * x;
  vf poly = splat(0.01713479f);
  poly = poly * square - 0.05298595f;
  poly = poly * square + 0.13324777f;
  poly = poly * square - 0.33333069f;
  return square < 0.25f ? x + x * square * poly : large;
}

// Lane l of step S of the transposition: of the pair (a, b), whose places differ by S, the upper result takes the lanes
// without bit S of a and b, the lower one those with it.
template <int S, bool kUpper, int... L>
static QEXPORT_INLINE vf exchange(vf a, vf b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (kUpper ? ((L & S) ? kLanes + L - S : L) : ((L & S) ? kLanes + L : L + S))...);
}

template <int S, int kCount>
static QEXPORT_INLINE void transpose_step(vf (&m)[kCount]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i & S) continue;
    const vf a = m[i], b = m[i + S];
    m[i] = exchange<S, true>(a, b, Lanes{});
    m[i + S] = exchange<S, false>(a, b, Lanes{});
  }
}

// m[i][l] <-> m[l][i].
static QEXPORT_INLINE void transpose(vf (&m)[kLanes]) {
  transpose_step<1>(m);
  transpose_step<2>(m);
  if constexpr (kLanes > 4) transpose_step<kLanes == 4 ? 2 : 4>(m);
  if constexpr (kLanes > 8) transpose_step<kLanes == 16 ? 8 : 2>(m);
}

static QEXPORT_INLINE vf from_bf16(vh x) { return float_of(__builtin_convertvector(x, vu) << 16); }

static QEXPORT_INLINE vf from_f16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  // The exponent is moved by a multiplication with 2^112, which also normalises the subnormals.
  const vu h = __builtin_convertvector(x, vu);
  const vu magnitude = (h & 0x7FFFu) << 13;
  const vf value = float_of(magnitude) * 5.192296858534828e33f;
  const vu special = (vu)(magnitude >= (0x7C00u << 13)) & 0x7F800000u;
  return float_of(bits_of(value) | special | ((h & 0x8000u) << 16));
#endif
}

// Float to bfloat16, round to nearest even; NaN stays NaN.
static QEXPORT_INLINE vh to_bf16(vf x) {
  const vu u = bits_of(x);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((vu)(x != x ? nan : rounded), vh);
}

// Float to half, round to nearest even; overflow becomes infinity.
static QEXPORT_INLINE vh to_f16(vf x) {
  const vu u = bits_of(x);
  const vu sign = (u >> 16) & 0x8000u;
  const vu a = u & 0x7FFFFFFFu;
  const vu normal = (a + 0xC8000FFFu + ((a >> 13) & 1u)) >> 13;    // exponent minus 112, rounded
  const vu subnormal = bits_of(float_of(a) + 0.5f) - 0x3F000000u;  // adding 0.5 aligns the mantissa to 2^-24
  vu h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477FF000u ? vu{} + 0x7C00u : h;
  h = a > 0x7F800000u ? vu{} + 0x7E00u : h;
  return __builtin_convertvector(h | sign, vh);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
