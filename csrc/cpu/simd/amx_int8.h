// The integer GEMM of superblocks on AMX tiles, for enough rows that unpacking the weights once pays.
//
// A stretch of half a superblock's weights stays in the L1 cache while every block of rows is multiplied with it; the
// activations stream past it from the L2 cache. Tile products wait for tile loads and little else, and the tile unit
// runs beside the vector ports: the first block's products unpack the weights just before they need them, and between
// the products the block before goes through the float epilogue and the next stretch's packed weights are fetched.
#pragma once

#include "amx_epilogue.h"
#include "tiles.h"

namespace resq {
namespace {

// Rows from which tiles are faster than unpacking in registers (measured: 8 % slower at 6, 7 % faster at 8).
constexpr int64_t kTileFromRows = 7;
constexpr int64_t kLead = 2;  // tiles between a weight's unpacking and its use
// Codes that stay in the L2 cache whole.
constexpr int64_t kPanelCodes = 5 << 18;
// Rows that share a stretch's unpacking: of 8192 columns 128 rows filled half of the L2 cache. Now of so many rows only
// the columns that are multiplied with several superblocks are in it, kSlabBytes of codes, beside kSumBytes of sums.
constexpr int64_t kTilePanelRows = 256, kSlabBytes = 512 << 10, kSumBytes = 1 << 20;

// What is done between tile products: so many lines to fetch and rows of the epilogue a step. Shares are whole, so that
// the branches are the same from step to step.
struct Between {
  Epilogue& epilogue;
  const uint8_t *ahead = nullptr, *ahead_end = nullptr;
  int64_t lines = 0, rows = 0;

  RESQ_INLINE void step() {
    if (ahead < ahead_end)
      for (int64_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    if (epilogue.left()) epilogue.advance(rows);
  }
};

// One product's operands: a [rows][lda] from its first column, b in the scratch, sums [rows][32] (from = null: zero).
struct Product {
  const int8_t* a;
  int64_t lda;
  const int32_t* from;
  int32_t* to;
  int64_t at, tiles;  // in the stretch
};

// 32 columns of one or two row tiles; kFresh: unpacks what it needs.
template <int kTiles, bool kFresh>
void multiply(const Product& p, const Unpacker& unpacker, int64_t half, uint8_t* scratch, Between& between) {
  constexpr int64_t stride = kHalf * 4, below = kTileRows * kHalf;
  if (!p.from) {
    tile_zero<0>();
    tile_zero<1>();
    if (kTiles == 2) tile_zero<2>();
    if (kTiles == 2) tile_zero<3>();
  } else {
    tile_stream<0>(p.from, stride);
    tile_stream<1>(p.from + 16, stride);
    if (kTiles == 2) tile_stream<2>(p.from + below, stride);
    if (kTiles == 2) tile_stream<3>(p.from + below + 16, stride);
  }
  for (int64_t t = 0; t < p.tiles; ++t) {
    if (kFresh) {
      unpacker.unpack(p.at + t + kLead, half, scratch);
      tile_fence();
    }
    const uint8_t* b = scratch + (p.at + t) * kPairBytes;
    const int8_t* a = p.a + t * kTileDepth;
    tile_load<6>(b, 64);
    tile_stream<4>(a, p.lda);
    tile_bytes<0, 4, 6>();
    tile_load<7>(b + 1024, 64);
    tile_bytes<1, 4, 7>();
    if (kTiles == 2) {
      tile_stream<5>(a + kTileRows * p.lda, p.lda);
      tile_bytes<2, 5, 6>();
      tile_bytes<3, 5, 7>();
    }
    between.step();
  }
  tile_store<0>(p.to, stride);
  tile_store<1>(p.to + 16, stride);
  if (kTiles == 2) tile_store<2>(p.to + below, stride);
  if (kTiles == 2) tile_store<3>(p.to + below + 16, stride);
}

void linear_tiles(const LinearArgs& args, int64_t superblock, int64_t superblock_end, int64_t begin, int64_t end) {
  if (end - begin < kTileFromRows) {
    linear_superblocks<Reading::side_by_side>(args, superblock, superblock_end, begin, end);
    return;
  }
  const PlanView& plan = args.plan;
  constexpr int64_t block = Epilogue::kBlockRows, words = Epilogue::kBlockWords;
  constexpr int64_t scratch_bytes = kStretchTiles * kPairBytes;
  const int64_t rows = end - begin, padded_rows = round_up(rows, kTileRows);
  const bool whole = rows * plan.padded_columns <= kPanelCodes;
  const int64_t depth = whole ? plan.padded_columns : max(1, kSlabBytes / (rows * kStretchTiles * kTileDepth));
  const int64_t most = max(1, kSumBytes / (rows * kSuperblock * static_cast<int64_t>(sizeof(float))));
  const int64_t abreast = whole ? 1 : min(superblock_end - superblock, most);
  const int64_t block_sums = round_up(rows, block) * kHalf, sums = 2 * abreast * block_sums;
  const int64_t terms_bytes = round_up(rows * plan.n_runs * static_cast<int64_t>(sizeof(RowTerms)), 64);
  // A stretch of weights; the products of runs that end, for this block and the one before; sums of the long runs that
  // go on, [half][row][column]; the layer's sums between stretches.
  const int64_t sums_bytes = (2 * kPieces * words + 2 * sums) * 4;
  uint8_t* scratch =
      static_cast<uint8_t*>(thread_scratch(Slot::tiles, scratch_bytes + sums_bytes + terms_bytes));
  int32_t* ended = reinterpret_cast<int32_t*>(scratch + scratch_bytes);
  int32_t* open = ended + 2 * kPieces * words;
  float* y = reinterpret_cast<float*>(open + sums);
  RowTerms* terms = reinterpret_cast<RowTerms*>(y + sums);
  take_rows(args, begin, end, terms);

  static constexpr TileShapes shapes;
  const TileScope scope(shapes);
  Stretches stretches(plan, superblock, superblock_end, depth, abreast);
  Stretch all[2];
  Ending endings[2];
  Unpacker unpacker(args);
  Epilogue epilogue(args, terms, begin);
  Between between{epilogue};
  int64_t turn = 0, ended_turn = 0;
  for (bool more = stretches.next(all[0]); more;) {
    const Stretch& stretch = all[turn];
    Ending& ending = endings[turn];
    turn ^= 1;
    const int64_t bytes = unpacker.take(stretch);
    more = stretches.next(all[turn]);
    between.ahead = unpacker.packed(stretch) + bytes;
    between.ahead_end = between.ahead + (more ? bytes : 0);  // the next stretch is about as long
    const int64_t steps = stretch.tiles * 2 * ((rows + block - 1) / block);
    between.lines = (bytes / 64 + steps - 1) / steps;
    ending.take(args, stretch);
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t t = 0; t < kLead; ++t) unpacker.unpack(t, half, scratch);
      tile_fence();
      for (int64_t row = 0; row < rows; row += block) {
        const bool two = padded_rows - row > kTileRows;
        between.rows = round_up((epilogue.left() + stretch.tiles - 1) / stretch.tiles, 2);
        int32_t* products = ended + ended_turn * kPieces * words;
        ended_turn ^= 1;
        const int64_t at = (stretch.place * 2 + half) * block_sums + row * kHalf;
        int32_t* to = products;
        for (int64_t i = 0; i < stretch.count; ++i) {
          const Piece& piece = stretch.pieces[i];
          const int8_t* a =
              args.codes + (begin + row) * args.code_stride + plan.runs[piece.run].activation_at + piece.k;
          const Product product{a, args.code_stride, piece.first ? nullptr : open + at, piece.last ? to : open + at,
                                piece.at, piece.tiles};
          to += piece.last ? words : 0;
          if (row == 0) {
            (two ? multiply<2, true> : multiply<1, true>)(product, unpacker, half, scratch, between);
          } else {
            (two ? multiply<2, false> : multiply<1, false>)(product, unpacker, half, scratch, between);
          }
        }
        if (ending.count) epilogue.start(ending, half, products, y + at, begin + row, min(rows - row, block));
      }
    }
  }
  epilogue.finish();
}

}  // namespace
}  // namespace resq
