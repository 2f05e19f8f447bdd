// Which CTA computes what, as integer maths for host and device.
#pragma once

#include <cstdint>

#include "formats.h"

namespace resq::cuda {

// Blocks [begin, end) of a tile's stream.
struct BlockRange {
  int32_t begin, end;
};

// Share `split` of `splits` of a stream of `blocks`: contiguous, in order, their sizes differ by at most one. In 32 bits, a
// 64-bit division being a subroutine: blocks * splits < 2^32.
RESQ_HD constexpr BlockRange split_range(int32_t blocks, int32_t splits, int32_t split) {
  const uint32_t all = static_cast<uint32_t>(blocks), at = static_cast<uint32_t>(split), of = static_cast<uint32_t>(splits);
  return {static_cast<int32_t>(all * at / of), static_cast<int32_t>(all * (at + 1) / of)};
}

// The split that holds `block`.
RESQ_HD constexpr int32_t split_of(int32_t blocks, int32_t splits, int32_t block) {
  return static_cast<int32_t>(((static_cast<uint32_t>(block) + 1) * static_cast<uint32_t>(splits) - 1) /
                              static_cast<uint32_t>(blocks));
}

// Partial sums of (split, run) go to slot split + run: from one (split, run) that shares blocks to the next, split or run
// or both grow, so that the slot is unique within a tile.
RESQ_HD constexpr int32_t partial_slots(int32_t splits, int32_t runs) { return splits + runs - 1; }

// Output tile `index` of a grid of `channel_tiles` x `token_tiles`: bands of kBand token tiles, within a band channel tile
// by channel tile, so that CTAs that run together share weights and activations in L2.
struct TilePlace {
  int32_t channel, token;
};

constexpr int kBand = 8;

RESQ_HD constexpr TilePlace tile_place(int32_t index, int32_t channel_tiles, int32_t token_tiles) {
  const int32_t band = index / (kBand * channel_tiles), first = band * kBand;
  const int32_t height = token_tiles - first < kBand ? token_tiles - first : kBand;
  const int32_t within = index - first * channel_tiles;
  return {within / height, first + within % height};
}

// Shared memory of activations for ldmatrix: rows of 64 bytes, whose 16-byte chunks are permuted so that the 8 rows of a
// matrix lie in 8 different bank groups. Offset of chunk `chunk` (0..3) of row `row`.
RESQ_HD constexpr uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

}  // namespace resq::cuda
