// The products of decode.h on AMX int8 tiles.
//
// A tile of 16 tokens of K, or of 64 tokens x 16 dims of V, is the unsigned operand of TDPBSUD word for word; only
// nibbles have to be spread over bytes first, once for all query rows. The time of a tile product goes with the rows of
// q: 2 bytes x 4 heads cost 8 clocks for what takes vpdpbusd 64. Nibbles are spread a little ahead of their product,
// into rings small enough that they, the page and the scores share the L1 cache.
#pragma once

#include "decode.h"
#include "tiles.h"

namespace resq {
namespace {

class TileProducts {
 public:
  TileProducts(const PageLayout& page, const DecodeShape& shape, void* scratch)
      : page_(page), shape_(shape), scope_(shapes(page, shape)), steps_(shape.low_bytes / 64),
        key_(static_cast<uint8_t*>(scratch)), value_low_(key_ + kRing * steps_ * kTile),
        value_high_(value_low_ + 2 * kValueBlock) {}

  static int64_t scratch_bytes(const DecodeShape& s) {
    return kRing * (s.low_bytes / 64) * kTile + 2 * kValueBlock + kSteps * s.high_lanes * kTile;
  }

  void scores(const Chunk& chunk, const PassIntegers& n) const {
    const int64_t high_tile = page_.high_padded * 16, low_tile = page_.low_padded * 8;
    const uint8_t* low = chunk.page + page_.key_low + chunk.token / kTokenTile * low_tile;
    const uint8_t* high = chunk.page + page_.key_high + chunk.token / kTokenTile * high_tile;
    const int64_t tiles = chunk.tokens / kTokenTile, q_stride = shape_.query_bytes;
    const int8_t* q = n.query;
    tile_load<kA>(q, q_stride);
    if (steps_ > 1) tile_load<kA2>(q + 64, q_stride);
    if (page_.high) tile_load<kAHigh>(q + shape_.low_bytes, q_stride);
    for (int64_t t = 0; t < min(tiles, kAhead); ++t) spread_keys(low + t * low_tile, t);
    for (int64_t t = 0; t < tiles; ++t) {
      if (t + kAhead < tiles) spread_keys(low + (t + kAhead) * low_tile, t + kAhead);
      tile_fence();
      const uint8_t* keys = key_ + t % kRing * steps_ * kTile;
      tile_zero<kC>();
      tile_load<kB>(keys, 64);
      tile_bytes<kC, kA, kB>();
      if (steps_ > 1) {
        tile_load<kB2>(keys + kTile, 64);
        tile_bytes<kC, kA2, kB2>();
      }
      for (int64_t s = 2; s < steps_; ++s) {
        tile_load<kA2>(q + 64 * s, q_stride);
        tile_load<kB2>(keys + s * kTile, 64);
        tile_bytes<kC, kA2, kB2>();
        if (s == steps_ - 1) tile_load<kA2>(q + 64, q_stride);
      }
      if (page_.high) {
        tile_zero<kC2>();
        tile_load<kBHigh>(high + t * high_tile, 64);
        tile_bytes<kC2, kAHigh, kBHigh>();
        tile_store<kC2>(n.score[1] + 16 * t, kChunk * 4);
      }
      tile_store<kC>(n.score[0] + 16 * t, kChunk * 4);
    }
  }

  void outputs(const Chunk& chunk, const PassIntegers& n) const {
    const int64_t lanes = shape_.low_lanes, quads = chunk.tokens / 4;
    const int64_t low_quad = page_.low_padded * 2, high_quad = page_.high_padded * 4;
    const uint8_t* low = chunk.page + page_.value_low + chunk.token / 4 * low_quad;
    const bool two = chunk.tokens > 64;
    spread_values(low, low_quad, quads, value_low_);
    tile_load<kA>(n.weight[0], kChunk);
    if (two) tile_load<kA2>(n.weight[0] + 64, kChunk);
    for (int64_t v = 0; v < lanes; ++v) {
      const uint8_t* values = value_low_ + v % 2 * kValueBlock;
      if (v + 1 < lanes) spread_values(low + 64 * (v + 1), low_quad, quads, value_low_ + (v + 1) % 2 * kValueBlock);
      tile_fence();
      multiply(values, 64, kSteps * kTile / 2, two, n.output + 16 * v);
      multiply(values + kSteps * kTile, 64, kSteps * kTile / 2, two, n.output + 16 * (lanes + v));
    }
    if (!page_.high) return;
    const uint8_t* high = chunk.page + page_.value_high + chunk.token / 4 * high_quad;
    if (chunk.tokens % 64) {  // an incomplete tile read in place could reach past the cache
      __builtin_memcpy(value_high_, high, static_cast<size_t>(quads * high_quad));
      high = value_high_;
      tile_fence();
    }
    tile_load<kA>(n.weight[1], kChunk);
    if (two) tile_load<kA2>(n.weight[1] + 64, kChunk);
    for (int64_t v = 0; v < shape_.high_lanes; ++v)
      multiply(high + 64 * v, high_quad, 16 * high_quad, two, n.output + 16 * (2 * lanes + v));
  }

 private:
  static constexpr int64_t kTile = 1024, kSteps = kChunk / 64;
  static constexpr int64_t kRing = 4, kAhead = 2;                  // tiles of K
  static constexpr int64_t kValueBlock = 2 * kSteps * kTile;       // one vector of lanes: low nibbles, high nibbles
  // Tile registers. Those up to kAHigh have a row per row of q, kBHigh one per word of K's high part.
  static constexpr int kC = 0, kC2 = 1, kA = 2, kA2 = 3, kAHigh = 4, kB = 5, kB2 = 6, kBHigh = 7;

  static TileShapes shapes(const PageLayout& page, const DecodeShape& shape) {
    TileShapes s;
    for (int t = kC; t <= kAHigh; ++t) s.rows[t] = static_cast<uint8_t>(2 * shape.rows);
    if (page.high) {  // the bytes of an A row and the words of B must agree
      s.rows[kBHigh] = static_cast<uint8_t>(page.high_padded / 4);
      s.row_bytes[kAHigh] = static_cast<uint16_t>(page.high_padded);
    }
    return s;
  }

  RESQ_INLINE static void spread(const uint8_t* from, uint8_t* low, uint8_t* high) {
    const __m512i mask = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(from);
    _mm512_store_si512(low, _mm512_and_si512(codes, mask));
    _mm512_store_si512(high, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
  }

  // Rows past the part's words keep old bytes: they meet zeros of q.
  void spread_keys(const uint8_t* from, int64_t t) const {
    uint8_t* to = key_ + t % kRing * steps_ * kTile;
    for (int64_t g = 0; g < page_.low_padded / 8; ++g) spread(from + g * 64, to + 128 * g, to + 128 * g + 64);
  }

  // Rows past the chunk's quads keep old bytes: their weights are 0.
  static void spread_values(const uint8_t* from, int64_t quad_bytes, int64_t quads, uint8_t* to) {
    for (int64_t i = 0; i < quads; ++i) spread(from + i * quad_bytes, to + 64 * i, to + kSteps * kTile + 64 * i);
  }

  // out [2 rows, 16] = weights [2 rows, 64 or 128 tokens] · V of 16 dims; the second 64 tokens lie `step` further.
  void multiply(const uint8_t* from, int64_t row_bytes, int64_t step, bool two, int32_t* out) const {
    tile_zero<kC>();
    tile_load<kB>(from, row_bytes);
    tile_bytes<kC, kA, kB>();
    if (two) {
      tile_load<kB2>(from + step, row_bytes);
      tile_bytes<kC, kA2, kB2>();
    }
    tile_store<kC>(out, shape_.width * 4);
  }

  const PageLayout& page_;
  const DecodeShape& shape_;
  const TileScope scope_;
  const int64_t steps_;
  uint8_t *key_, *value_low_, *value_high_;
};

}  // namespace
}  // namespace resq
