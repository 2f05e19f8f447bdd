// The integer GEMM of one superblock on AMX tiles, for enough rows that unpacking the weights once pays.
//
// A tile of the packed weight holds 16 columns x 64 k as TDPBSUD wants its unsigned operand: row i is k-group i (4 k),
// word n is column n. The packed layout has just these words with two k-groups a byte, so a stretch of kDepth columns is
// unpacked into a scratch that stays in the L1 cache, and every row of the panel is multiplied with it. The tile unit
// runs beside the vector ports, so the next stretch is unpacked in small portions between the tile products.
//
// Offsets and the float epilogue are those of gemm_int8.h: results are equal bit for bit.
#pragma once

#include "amx_epilogue.h"
#include "tiles.h"

namespace resq {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 64;                         // k of a tile product
constexpr int64_t kStretchTiles = 4;                       // tile products before the next stretch of k
constexpr int64_t kDepth = kStretchTiles * kTileDepth;     // 2 stretches x 64 columns x 256 k = 32 of 48 KiB
constexpr int64_t kStretchBytes = kDepth * kSuperblock;

// Rows from which tiles are faster than unpacking in registers (measured: 8 % slower at 6, 7 % faster at 8).
constexpr int64_t kTileFromRows = 7;

// A stretch of one run: up to kDepth columns.
struct Stretch {
  int64_t run = -1, k = 0, tiles = 0;
  bool first = true, last = true;  // of its run
};

// Walks the stretches of a superblock and unpacks them, portion by portion.
struct Unpacker {
  const PlanView& plan;
  const uint8_t* weights;
  Stretch at;
  const uint8_t* from = nullptr;
  uint8_t* to = nullptr;
  int64_t row = 0, rows = 0;  // k-groups done, and to do (a pair of them where weights are nibbles)
  bool nibbles = false;

  // The stretch after `at` becomes current, to be unpacked into `scratch`; false after the last one.
  bool next(uint8_t* scratch) {
    const bool same = at.run >= 0 && !at.last;
    at.k = same ? at.k + kDepth : 0;
    at.run += same ? 0 : 1;
    if (at.run == plan.n_runs) return false;
    const RunPlace& run = plan.runs[at.run];
    const int64_t columns = min(kDepth, run.padded - at.k);
    at.first = at.k == 0;
    at.last = at.k + columns == run.padded;
    at.tiles = (columns + kTileDepth - 1) / kTileDepth;
    nibbles = run.nibbles;
    from = weights + run.weight_at + at.k * kSuperblock / (nibbles ? 2 : 1);
    to = scratch;
    row = 0;
    rows = columns / 4;
    // The last product takes whole tiles: rows past the run's end are zero.
    for (int64_t i = rows; i < at.tiles * kTileRows; ++i)
      for (int64_t c = 0; c < 4; ++c) _mm512_store_si512(place(i, c), _mm512_setzero_si512());
    return true;
  }

  RESQ_INLINE uint8_t* place(int64_t i, int64_t c) const {
    return to + (i / kTileRows * 4 + c) * 1024 + i % kTileRows * 64;
  }

  // Two k-groups of all 64 columns.
  RESQ_INLINE void pair() {
    uint8_t* first = place(row, 0);
    if (nibbles) {
      const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
      for (int64_t c = 0; c < 4; ++c) {
        const __m512i both = _mm512_loadu_si512(from + c * 64);
        _mm_prefetch(from + c * 64 + kPrefetch, _MM_HINT_T0);  // M = 16: a tenth faster
        _mm512_store_si512(first + c * 1024, _mm512_and_si512(both, mask));
        _mm512_store_si512(first + c * 1024 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
      }
      from += 256;
    } else {
#pragma GCC unroll 4
      for (int64_t c = 0; c < 4; ++c) {
        _mm_prefetch(from + c * 64 + kPrefetch, _MM_HINT_T0);
        _mm_prefetch(from + 256 + c * 64 + kPrefetch, _MM_HINT_T0);
        _mm512_store_si512(first + c * 1024, _mm512_loadu_si512(from + c * 64));
        _mm512_store_si512(first + c * 1024 + 64, _mm512_loadu_si512(from + 256 + c * 64));
      }
      from += 512;
    }
    row += 2;
  }

  RESQ_INLINE void advance(int64_t pairs) {
    for (; pairs > 0 && row < rows; --pairs) pair();
  }
};

// acc[32][64] (+)= A · B for 2 row tiles, 32 columns at a time. The activations are in the L2 cache, and no prefetcher
// follows 32 rows: while the second half reads its own from L1, it fetches those that come next, at `ahead` (a tenth
// faster at 2048 x 2048, M = 1024).
RESQ_INLINE void multiply_two(const int8_t* a, const int8_t* ahead, int64_t lda, const uint8_t* b,
                              const Stretch& stretch, int32_t* acc, Unpacker& unpacker, int64_t pairs) {
  constexpr int64_t stride = kSuperblock * 4;
  for (int64_t half = 0; half < 2; ++half) {
    int32_t* c = acc + half * 32;
    int32_t* d = c + kTileRows * kSuperblock;
    if (stretch.first) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    } else {
      tile_load<0>(c, stride);
      tile_load<1>(c + 16, stride);
      tile_load<2>(d, stride);
      tile_load<3>(d + 16, stride);
    }
    for (int64_t t = 0; t < stretch.tiles; ++t) {
      const uint8_t* p = b + (t * 4 + half * 2) * 1024;
      tile_load<6>(p, 64);
      tile_load<4>(a + t * kTileDepth, lda);
      tile_bytes<0, 4, 6>();
      tile_load<7>(p + 1024, 64);
      tile_bytes<1, 4, 7>();
      tile_load<5>(a + kTileRows * lda + t * kTileDepth, lda);
      tile_bytes<2, 5, 6>();
      tile_bytes<3, 5, 7>();
      if (half == 1)
        for (int64_t i = 0; i < 2 * kTileRows; ++i) _mm_prefetch(ahead + i * lda + t * kTileDepth, _MM_HINT_T0);
      unpacker.advance(pairs);
    }
    tile_store<0>(c, stride);
    tile_store<1>(c + 16, stride);
    tile_store<2>(d, stride);
    tile_store<3>(d + 16, stride);
  }
}

// acc[16][64] (+)= A · B for a single row tile, which nothing follows in this stretch.
RESQ_INLINE void multiply_one(const int8_t* a, const int8_t*, int64_t lda, const uint8_t* b,
                              const Stretch& stretch, int32_t* acc, Unpacker& unpacker, int64_t pairs) {
  constexpr int64_t stride = kSuperblock * 4;
  if (stretch.first) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(acc, stride);
    tile_load<1>(acc + 16, stride);
    tile_load<2>(acc + 32, stride);
    tile_load<3>(acc + 48, stride);
  }
  for (int64_t t = 0; t < stretch.tiles; ++t) {
    const uint8_t* p = b + t * 4096;
    tile_load<4>(a + t * kTileDepth, lda);
    tile_load<5>(p, 64);
    tile_bytes<0, 4, 5>();
    tile_load<6>(p + 1024, 64);
    tile_bytes<1, 4, 6>();
    tile_load<7>(p + 2048, 64);
    tile_bytes<2, 4, 7>();
    tile_load<5>(p + 3072, 64);
    tile_bytes<3, 4, 5>();
    unpacker.advance(pairs);
  }
  tile_store<0>(acc, stride);
  tile_store<1>(acc + 16, stride);
  tile_store<2>(acc + 32, stride);
  tile_store<3>(acc + 48, stride);
}

void linear_tiles(const LinearArgs& args, int64_t superblock, int64_t begin, int64_t end) {
  if (end - begin < kTileFromRows) {
    linear_superblock(args, superblock, begin, end);
    return;
  }
  const PlanView& plan = args.plan;
  const int64_t rows = end - begin, padded_rows = round_up(rows, kTileRows);
  uint8_t* scratch = static_cast<uint8_t*>(
      thread_scratch(Slot::tiles, 2 * kStretchBytes + 2 * padded_rows * kSuperblock * 4));
  int32_t* acc = reinterpret_cast<int32_t*>(scratch + 2 * kStretchBytes);
  float* y = reinterpret_cast<float*>(acc + padded_rows * kSuperblock);
  // Tile products per column of tiles in a stretch, to spread the unpacking over them.
  const int64_t visits = padded_rows / (2 * kTileRows) * 2 + padded_rows / kTileRows % 2;

  static constexpr TileShapes shapes;
  const TileScope scope(shapes);
  Unpacker unpacker{plan, args.packed + superblock * plan.superblock_bytes, {}};
  Epilogue epilogue(args, superblock);
  unpacker.next(scratch);
  unpacker.advance(kDepth);
  int64_t turn = 0;
  for (bool more = true; more;) {
    const Stretch stretch = unpacker.at;
    const uint8_t* b = scratch + turn * kStretchBytes;
    turn ^= 1;
    more = unpacker.next(scratch + turn * kStretchBytes);
    const int64_t portions = visits * stretch.tiles;
    const int64_t pairs = more ? (unpacker.rows / 2 + portions - 1) / portions : 0;
    const int8_t* a = args.codes + begin * args.code_stride + plan.runs[stretch.run].activation_at + stretch.k;
    tile_fence();
    if (stretch.first) epilogue.take_run(stretch.run);
    const bool fetch = stretch.first && stretch.run + 1 == plan.n_runs;
    for (int64_t row = 0; row < rows;) {
      const bool two = padded_rows - row > kTileRows;
      // Where a stretch is the whole run, its sums live from here to the epilogue only, in the L1 cache.
      int32_t* sums = acc + (stretch.first && stretch.last ? 0 : row * kSuperblock);
      const int8_t* now = a + row * args.code_stride;
      const int8_t* ahead = row + 2 * kTileRows < rows ? now + 2 * kTileRows * args.code_stride : a + kDepth;
      (two ? multiply_two : multiply_one)(now, ahead, args.code_stride, b, stretch, sums, unpacker, pairs);
      const int64_t step = min(rows - row, two ? 2 * kTileRows : kTileRows);
      if (fetch) epilogue.fetch(begin + row, step);
      if (stretch.last) epilogue.finish(stretch.run, begin + row, step, sums, y + row * kSuperblock);
      row += step;
    }
    unpacker.advance(more ? kDepth : 0);
  }
}

}  // namespace
}  // namespace resq
