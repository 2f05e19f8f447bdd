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
  TileProducts(const PageLayout& page, const DecodeShape& shape, void* scratch, Prefetch& prefetch)
      : page_(page), shape_(shape), prefetch_(prefetch), scope_(shapes(page, shape)), steps_(shape.low_bytes / 64),
        key_(static_cast<uint8_t*>(scratch)), value_low_(key_ + kRing * steps_ * kTile),
        value_high_(value_low_ + 2 * kValueBlock),
        product_(reinterpret_cast<int32_t*>(value_high_ + kSteps * shape.high_lanes * kTile)) {}

  static int64_t scratch_bytes(const DecodeShape& s) {
    return kRing * (s.low_bytes / 64) * kTile + 2 * kValueBlock + kSteps * s.high_lanes * kTile + 4 * kTile;
  }

  // Of the prefetch, on a whole chunk: one for every vector of codes.
  static int64_t prefetch_steps(const PageLayout& p, const DecodeShape& s) {
    return p.low_padded / 8 * (kChunk / kTokenTile) + s.low_lanes * (kChunk / 4);
  }

  void scores(const Chunk& chunk, const PassOperands& n) const {
    const int64_t tiles = chunk.tokens / kTokenTile;
    for (int64_t t = 0; t < min(tiles, kAhead); ++t) spread_keys(chunk, t);
    tile_fence();
    load_queries(n);
    for (int64_t t = 0; t < tiles; ++t) {
      multiply_keys(chunk, n, t);
      if (t > 0) add_scores(chunk, n, t - 1);  // while the products are made
      // After the loads above: they would wait for stores as far as 4096 bytes away.
      if (t + kAhead < tiles) spread_keys(chunk, t + kAhead);
      tile_fence();
      int32_t* product = product_ + t % 2 * kTilePair;
      tile_store<kC>(product, 64);
      if (page_.high) tile_store<kC2>(product + kTilePair / 2, 64);
    }
    add_scores(chunk, n, tiles - 1);
  }

  // A vector of lanes and 64 tokens at a time, then the high part.
  void outputs(const Chunk& chunk, const PassOperands& n, int32_t* out) const {
    const int64_t lanes = shape_.low_lanes, steps = chunk.tokens > 64 ? 2 : 1;
    spread_values(chunk, 0, 0);
    load_weights(n.weight[0], steps);
    for (int64_t v = 0; v < lanes; ++v) {
      tile_zero<kC>();
      tile_zero<kC2>();
      for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* values = value_low_ + (v * steps + step) % 2 * kValueBlock;
        tile_load<kB>(values, 64);
        tile_load<kB2>(values + kTile, 64);
        step ? tile_bytes<kC, kA2, kB>() : tile_bytes<kC, kA, kB>();
        step ? tile_bytes<kC2, kA2, kB2>() : tile_bytes<kC2, kA, kB2>();
        const bool last = step + 1 == steps;
        if (!last || v + 1 < lanes) spread_values(chunk, v + last, last ? 0 : step + 1);
        tile_fence();
      }
      tile_store<kC>(out + 16 * v, shape_.width * 4);
      tile_store<kC2>(out + 16 * (lanes + v), shape_.width * 4);
    }
    if (page_.high) high_outputs(chunk, n, steps, out + 32 * lanes);
  }

 private:
  static constexpr int64_t kTile = 1024, kSteps = kChunk / 64;
  static constexpr int64_t kRing = 2, kAhead = 1;      // tiles of K; four and two were no faster
  static constexpr int64_t kValueBlock = 2 * kTile;    // 64 tokens of 16 lanes: low nibbles, high nibbles
  static constexpr int64_t kTilePair = 2 * kTile / 4;  // products of a tile of keys: low part, high part
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

  RESQ_INLINE static void spread(const uint8_t* from, uint8_t* low, uint8_t* high, Prefetch::Steps& ahead) {
    ahead.step();
    const __m512i mask = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(from);
    _mm512_store_si512(low, _mm512_and_si512(codes, mask));
    _mm512_store_si512(high, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
  }

  void load_queries(const PassOperands& n) const {
    const int64_t q_stride = shape_.query_bytes;
    tile_load<kA>(n.query, q_stride);
    if (steps_ > 1) tile_load<kA2>(n.query + 64, q_stride);
    if (page_.high) tile_load<kAHigh>(n.query + shape_.low_bytes, q_stride);
  }

  // Into kC and, of the high part, kC2.
  void multiply_keys(const Chunk& chunk, const PassOperands& n, int64_t t) const {
    const int64_t q_stride = shape_.query_bytes;
    const int8_t* q = n.query;
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
      const int64_t high_tile = page_.high_padded * 16;
      tile_zero<kC2>();
      tile_load<kBHigh>(chunk.page + page_.key_high + (chunk.token / kTokenTile + t) * high_tile, 64);
      tile_bytes<kC2, kAHigh, kBHigh>();
    }
  }

  // Scores of 16 keys from their products.
  void add_scores(const Chunk& chunk, const PassOperands& n, int64_t t) const {
    const int64_t rows = shape_.rows, token = chunk.token + 16 * t;
    const int32_t* product = product_ + t % 2 * kTilePair;
    const auto of_part = [&](int64_t part, int64_t r) {
      return _mm512_load_si512(product + part * (kTilePair / 2) + 16 * r);
    };
    const KeyScales low(page_, chunk.page, 0, token);
    float* score = n.score + 16 * t;
    if (!page_.high) {
      for (int64_t r = 0; r < rows; ++r)
        _mm512_storeu_ps(score + r * kScoreStride, low.first(of_part(0, r), of_part(0, rows + r), n.row[r].sum[0]));
      return;
    }
    const KeyScales high(page_, chunk.page, 1, token);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 first = low.first(of_part(0, r), of_part(0, rows + r), n.row[r].sum[0]);
      _mm512_storeu_ps(score + r * kScoreStride,
                       high.add(first, of_part(1, r), of_part(1, rows + r), n.row[r].sum[1]));
    }
  }

  // Rows past the part's words keep old bytes: they meet zeros of q.
  void spread_keys(const Chunk& chunk, int64_t t) const {
    const int64_t tile = page_.low_padded * 8;
    const uint8_t* from = chunk.page + page_.key_low + (chunk.token / kTokenTile + t) * tile;
    uint8_t* to = key_ + t % kRing * steps_ * kTile;
    Prefetch::Steps ahead(prefetch_);
#pragma GCC unroll 4
    for (int64_t g = 0; g < page_.low_padded / 8; ++g) spread(from + g * 64, to + 128 * g, to + 128 * g + 64, ahead);
  }

  // 64 tokens of 16 lanes. Rows past the chunk's quads keep old bytes: their weights are 0.
  void spread_values(const Chunk& chunk, int64_t v, int64_t step) const {
    const int64_t quad = page_.low_padded * 2, first = 16 * step, steps = chunk.tokens > 64 ? 2 : 1;
    const uint8_t* from = chunk.page + page_.value_low + (chunk.token / 4 + first) * quad + 64 * v;
    uint8_t* to = value_low_ + (v * steps + step) % 2 * kValueBlock;
    Prefetch::Steps ahead(prefetch_);
#pragma GCC unroll 4
    for (int64_t i = 0; i < min(chunk.tokens / 4 - first, int64_t{16}); ++i)
      spread(from + i * quad, to + 64 * i, to + kTile + 64 * i, ahead);
  }

  static void load_weights(const int8_t* weight, int64_t steps) {
    tile_fence();
    tile_load<kA>(weight, kRowStride);
    if (steps > 1) tile_load<kA2>(weight + 64, kRowStride);
  }

  void high_outputs(const Chunk& chunk, const PassOperands& n, int64_t steps, int32_t* out) const {
    const int64_t high_quad = page_.high_padded * 4;
    const uint8_t* high = chunk.page + page_.value_high + chunk.token / 4 * high_quad;
    if (chunk.tokens % 64) {  // an incomplete tile read in place could reach past the cache
      __builtin_memcpy(value_high_, high, static_cast<size_t>(chunk.tokens / 4 * high_quad));
      high = value_high_;
    }
    load_weights(n.weight[1], steps);
    for (int64_t v = 0; v < shape_.high_lanes; ++v) {
      tile_zero<kC>();
      tile_load<kB>(high + 64 * v, high_quad);
      tile_bytes<kC, kA, kB>();
      if (steps > 1) {
        tile_load<kB2>(high + 64 * v + 16 * high_quad, high_quad);
        tile_bytes<kC, kA2, kB2>();
      }
      tile_store<kC>(out + 16 * v, shape_.width * 4);
    }
  }

  const PageLayout& page_;
  const DecodeShape& shape_;
  Prefetch& prefetch_;
  const TileScope scope_;
  const int64_t steps_;
  uint8_t *key_, *value_low_, *value_high_;
  int32_t* product_;  // of two tiles of keys
};

}  // namespace
}  // namespace resq
