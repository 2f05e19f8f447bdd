// The products of prefill.h on AMX bfloat16 tiles.
#pragma once

#include "prefill.h"
#include "tiles.h"

namespace resq {
namespace {

class Bf16Tiles {
 public:
  Bf16Tiles() : scope_(shapes_) {}
  static void fence() { tile_fence(); }

  // Tiles `tile` and `tile` + 1 of a product, as far as it has them: four accumulators, two tiles of A, two of B.
  static void block(const Product& x, int64_t tile, bool add) {
    tile + 1 < x.tiles ? columns<2>(x, tile, add) : columns<1>(x, tile, add);
  }

 private:
  template <int kColumns>
  static void columns(const Product& x, int64_t tile, bool add) {
    float* c = x.c + 16 * tile;
    float* below = c + 16 * x.c_floats;
    const int64_t stride = x.c_floats * 4;
    if (add) {
      tile_load<0>(c, stride);
      tile_load<2>(below, stride);
      if constexpr (kColumns == 2) tile_load<1>(c + 16, stride), tile_load<3>(below + 16, stride);
    } else {
      tile_zero<0>();
      tile_zero<2>();
      if constexpr (kColumns == 2) tile_zero<1>(), tile_zero<3>();
    }
    const uint8_t* b = x.b + tile * x.b_bytes;
    for (int64_t term = 0; term < x.terms; ++term, b += 1024 * x.steps) {
      for (int64_t s = 0; s < x.steps; ++s) {
        tile_load<4>(x.a + 32 * s, x.a_bytes);
        tile_load<6>(b + 1024 * s, 64);
        tile_bfloats<0, 4, 6>();
        tile_load<5>(x.a + 32 * s + 16 * (x.a_bytes / 2), x.a_bytes);
        tile_bfloats<2, 5, 6>();
        if constexpr (kColumns == 2) {
          tile_load<7>(b + x.b_bytes + 1024 * s, 64);
          tile_bfloats<1, 4, 7>();
          tile_bfloats<3, 5, 7>();
        }
      }
    }
    tile_store<0>(c, stride);
    tile_store<2>(below, stride);
    if constexpr (kColumns == 2) tile_store<1>(c + 16, stride), tile_store<3>(below + 16, stride);
  }

  static constexpr TileShapes shapes_{};
  const TileScope scope_;
};

}  // namespace
}  // namespace resq
