// The tile registers of cpp/cpu/tiles.h, whose namespace this is included in, in plain C++.

static thread_local float tile_rows[8][16][16];
static thread_local int tile_scopes = 0;  // TileRegisters alive

struct TileRegisters {
  TileRegisters() { ++tile_scopes; }
  ~TileRegisters() { --tile_scopes; }
};

template <int kTile>
static void tile_load(const float* p, int64_t stride) {
  const TileShapes shapes;
  if (tile_scopes == 0) __builtin_trap();  // as the processor does
  for (int row = 0; row < shapes.rows[kTile]; ++row) {
    __builtin_memcpy(tile_rows[kTile][row], p + row * stride, shapes.row_bytes[kTile]);
  }
}

template <int kTile>
static void tile_store(float* p, int64_t stride) {
  const TileShapes shapes;
  if (tile_scopes == 0) __builtin_trap();
  for (int row = 0; row < shapes.rows[kTile]; ++row) {
    __builtin_memcpy(p + row * stride, tile_rows[kTile][row], shapes.row_bytes[kTile]);
  }
}

// The upper and the lower half of a float, each a bfloat16.
static inline float upper_half(float pair) { return float_of((bits_of(splat(pair)) & 0xFFFF0000u))[0]; }
static inline float lower_half(float pair) { return float_of(bits_of(splat(pair)) << 16)[0]; }

template <int kC, int kA, int kB>
static void tile_product() {
  const TileShapes shapes;
  static_assert(kC < kWideA, "accumulators come first");
  const int pairs = shapes.row_bytes[kA] / 4;
  if (tile_scopes == 0 || shapes.rows[kB] != pairs) __builtin_trap();
  for (int row = 0; row < 16; ++row) {
    for (int lane = 0; lane < 16; ++lane) {
      float sum = tile_rows[kC][row][lane];
      for (int i = 0; i < pairs; ++i) {
        const float a = tile_rows[kA][row][i], b = tile_rows[kB][i][lane];
        sum += lower_half(a) * lower_half(b) + upper_half(a) * upper_half(b);
      }
      tile_rows[kC][row][lane] = sum;
    }
  }
}
