// Rows of a product in blocks whose sums the registers hold.
#pragma once

#include "simd.h"

namespace qexport {
namespace QEXPORT_ISA {

// c + ld, computed here and now: the multiples of ld, kept for reuse, would crowd out the registers of the inner loops.
template <class T>
static QEXPORT_INLINE T* next_row(T* c, int64_t ld) {
  c += ld;
  asm("" : "+r"(c));
  return c;
}

// body(b, integral constant kRows) for all `rows` values of b, in blocks of kBlock, then 4, 2, 1.
template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};
template <class Body>
static QEXPORT_INLINE void for_row_blocks(int64_t rows, const Body& body) {
  int64_t b = 0;
#pragma GCC unroll 2
  for (; b + kBlock <= rows; b += kBlock) body(b, RowCount<kBlock>{});
  for (; b + 4 <= rows; b += 4) body(b, RowCount<4>{});
  for (; b + 2 <= rows; b += 2) body(b, RowCount<2>{});
  for (; b < rows; ++b) body(b, RowCount<1>{});
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
