// Weights of a superblock on their way to AMX tiles: stretches of k, unpacked tile by tile into a scratch.
//
// A tile of the packed weight holds 16 columns x 64 k as TDPBSUD wants its unsigned operand: row i is k-group i (4 k),
// word n is column n. The packed layout has just these words with two k-groups a byte.
#pragma once

#include "gemm_int8.h"

namespace resq {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 64;            // k of a tile product
constexpr int64_t kHalf = kSuperblock / 2;    // columns that are multiplied together: two tiles
constexpr int64_t kPairBytes = kTileDepth * kHalf;
// Of a stretch: for half a superblock 32 of the L1 cache's 48 KiB. Sums of a run that goes on pass through L2.
constexpr int64_t kStretchTiles = 16;
constexpr int64_t kPieces = 4;  // runs in a stretch

// Consecutive tiles of one run.
struct Piece {
  int64_t run, k, columns, tiles;
  int64_t at;        // first tile in the stretch
  bool first, last;  // of its run
};

// What is unpacked and multiplied together: shares of long runs, and short ones that fit whole. Its packed weights are
// consecutive.
struct Stretch {
  int64_t superblock = 0, count = 0, tiles = 0;
  int64_t place = 0;  // of the superblock among those worked on together
  Piece pieces[kPieces];
};

// Walks the stretches of superblocks [begin, end): of `abreast` superblocks all the first `depth`, whose activations
// stay in a cache meanwhile, then the next `depth`.
class Stretches {
 public:
  Stretches(const PlanView& plan, int64_t begin, int64_t end, int64_t depth, int64_t abreast)
      : plan_(plan), first_(begin), superblock_(begin), end_(end), depth_(depth), abreast_(abreast) {}

  bool next(Stretch& stretch) {
    if (taken_ == depth_ || at_.run == plan_.n_runs) turn();
    stretch.superblock = superblock_;
    stretch.place = superblock_ - first_;
    stretch.count = stretch.tiles = 0;
    if (superblock_ == end_) return false;
    while (at_.run < plan_.n_runs && stretch.count < kPieces) {
      const RunPlace& run = plan_.runs[at_.run];
      const int64_t left = (run.padded - at_.k + kTileDepth - 1) / kTileDepth, room = kStretchTiles - stretch.tiles;
      if (room == 0 || (left > room && left <= kStretchTiles)) break;
      const int64_t tiles = min(left, room), columns = min(tiles * kTileDepth, run.padded - at_.k);
      stretch.pieces[stretch.count++] = {at_.run, at_.k, columns, tiles, stretch.tiles, at_.k == 0, tiles == left};
      stretch.tiles += tiles;
      at_.k = tiles == left ? 0 : at_.k + columns;
      if (tiles < left) break;
      ++at_.run;
    }
    ++taken_;
    return true;
  }

 private:
  struct Place {
    int64_t run, k;
  };

  // To where the next superblock, the next `depth` or the next `abreast` begin.
  void turn() {
    taken_ = 0;
    const int64_t last = min(first_ + abreast_, end_);
    if (++superblock_ == last && at_.run < plan_.n_runs) {
      superblock_ = first_;
      from_ = at_;
      return;
    }
    if (superblock_ == last) {
      first_ = last;
      from_ = {0, 0};
    }
    at_ = from_;
  }

  const PlanView& plan_;
  int64_t first_, superblock_, end_, depth_, abreast_, taken_ = 0;
  Place at_{0, 0}, from_{0, 0};
};

// The tiles of a stretch: where they are packed, and half a superblock of them unpacked.
class Unpacker {
 public:
  explicit Unpacker(const LinearArgs& args) : args_(args) {}

  // First byte of a stretch's packed weights.
  const uint8_t* packed(const Stretch& stretch) const {
    const Piece& piece = stretch.pieces[0];
    const RunPlace& run = args_.plan.runs[piece.run];
    return args_.packed + stretch.superblock * args_.plan.superblock_bytes + run.weight_at +
           piece.k * kSuperblock / (run.nibbles ? 2 : 1);
  }

  // Returns the bytes of its packed weights.
  int64_t take(const Stretch& stretch) {
    tiles_ = stretch.tiles;
    const uint8_t* at = packed(stretch);
    const uint8_t* begin = at;
    for (int64_t i = 0; i < stretch.count; ++i) {
      const Piece& piece = stretch.pieces[i];
      const bool nibbles = args_.plan.runs[piece.run].nibbles;
      for (int64_t t = 0; t < piece.tiles; ++t) {
        const int64_t columns = min(kTileDepth, piece.columns - t * kTileDepth);
        sources_[piece.at + t] = {at, columns / 8, nibbles};
        at += columns * kSuperblock / (nibbles ? 2 : 1);
      }
    }
    return at - begin;
  }

  // Tile `t` of the stretch, both tiles of columns; nothing past the last one.
  RESQ_INLINE void unpack(int64_t t, int64_t half, uint8_t* scratch) const {
    if (t >= tiles_) return;
    const Source& source = sources_[t];
    const uint8_t* from = source.from + half * 128;
    uint8_t* to = scratch + t * kPairBytes;
    if (source.pairs == kTileRows / 2) {
      if (source.nibbles) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kTileRows / 2; ++i) nibble_pair(from + i * 256, to + i * 128);
      } else {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kTileRows / 2; ++i) byte_pair(from + i * 512, to + i * 128);
      }
      return;
    }
    // The product takes whole tiles: rows past the run's end are zero.
    for (int64_t i = 0; i < kTileRows / 2; ++i) {
      if (i >= source.pairs) {
        for (int64_t c = 0; c < 2; ++c)
          for (int64_t row = 0; row < 2; ++row)
            _mm512_store_si512(to + i * 128 + c * 1024 + row * 64, _mm512_setzero_si512());
      } else if (source.nibbles) {
        nibble_pair(from + i * 256, to + i * 128);
      } else {
        byte_pair(from + i * 512, to + i * 128);
      }
    }
  }

 private:
  struct Source {
    const uint8_t* from;
    int64_t pairs;  // of k-groups
    bool nibbles;
  };

  // Two k-groups of 32 columns.
  static RESQ_INLINE void nibble_pair(const uint8_t* from, uint8_t* to) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 2
    for (int64_t c = 0; c < 2; ++c) {
      const __m512i both = _mm512_loadu_si512(from + c * 64);
      _mm512_store_si512(to + c * 1024, _mm512_and_si512(both, mask));
      _mm512_store_si512(to + c * 1024 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
    }
  }
  static RESQ_INLINE void byte_pair(const uint8_t* from, uint8_t* to) {
#pragma GCC unroll 2
    for (int64_t c = 0; c < 2; ++c) {
      _mm512_store_si512(to + c * 1024, _mm512_loadu_si512(from + c * 64));
      _mm512_store_si512(to + c * 1024 + 64, _mm512_loadu_si512(from + 256 + c * 64));
    }
  }

  const LinearArgs& args_;
  int64_t tiles_ = 0;
  Source sources_[kStretchTiles];
};

}  // namespace
}  // namespace resq
