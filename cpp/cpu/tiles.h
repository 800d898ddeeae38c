// Tile registers (AMX) and the product of bfloat16 that they have:
//
//     C[16][16] += A[16][2 n] B[2 n][16]     C in float32; B in pairs of rows, as block_products.h keeps queries and p
//
// n is 16 for the wide operands and 8, one block of keys, for the half ones. Either product takes 16 cycles. The processor
// renames the registers as they are filled, so that one name for each operand is enough.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(QEXPORT_EMULATED_TILES)
#define QEXPORT_TILES 1
#endif

namespace qexport {
namespace QEXPORT_ISA {

#if defined(QEXPORT_TILES)
constexpr bool kTiles = true;
// Accumulators are the registers 0 to 3, one for each vector of lanes of a block of rows.
constexpr int kWideA = 4, kWideB = 5, kHalfA = 6, kHalfB = 7;
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
static_assert(sizeof(TileShapes) == 64, "what ldtilecfg reads");

#if defined(QEXPORT_EMULATED_TILES)
#include "emulated_tiles.h"  // of the tests
#else
// The shapes of the registers while it lives. Without it a tile instruction is not legal; making it takes 200 cycles.
class TileRegisters {
 public:
  TileRegisters() {
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Rows `stride` floats apart.
template <int kTile>
static QEXPORT_INLINE void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride * 4), "i"(kTile) : "memory");
}
template <int kTile>
static QEXPORT_INLINE void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride * 4), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
static QEXPORT_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
#endif

// body(integral constant i) for i = 0 .. kCount - 1: the number of a register is part of the instruction.
template <class Body, int... I>
static QEXPORT_INLINE void for_tiles(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int kCount, class Body>
static QEXPORT_INLINE void for_tiles(const Body& body) {
  for_tiles(body, std::make_integer_sequence<int, kCount>{});
}
#else
constexpr bool kTiles = false;
struct TileRegisters {
  TileRegisters() {}  // not trivial: an object of it counts as used
};
#endif

}  // namespace QEXPORT_ISA
}  // namespace qexport
