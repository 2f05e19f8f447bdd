// The products of decode.h with vpdpbusd, on the packed codes as they lie in the page.
#pragma once

#include "decode.h"
#include "micro_avx512.h"

namespace resq {
namespace {

// A part of K, and where the scores go.
struct KeyPart {
  const PageLayout& page;
  const Chunk& chunk;
  const int8_t* q;  // [2 rows, q_stride]
  int64_t q_stride;
  const QueryRow* row;  // [rows]
  float* score;         // [rows, kScoreStride]
};

// Scores of R/2 rows (R rows of bytes of q) and NT tiles of 16 tokens from `first` on: those of the low part (nibbles)
// are stored, the high part's added.
template <int R, int NT, bool kNibbles>
void key_products(const KeyPart& part, int64_t first, Prefetch& prefetch) {
  const PageLayout& p = part.page;
  const int64_t words = kNibbles ? p.low_padded / 8 : p.high_padded / 4, tile_bytes = 64 * words;
  const int64_t token = part.chunk.token + 16 * first, q_stride = part.q_stride;
  const uint8_t* tile = part.chunk.page + (kNibbles ? p.key_low : p.key_high) + token / kTokenTile * tile_bytes;
  const int8_t* q = part.q;
  __m512i acc[R][NT];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) acc[r][t] = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(15);
  Prefetch::Steps ahead(prefetch);
  for (int64_t g = 0; g < words; ++g) {
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      const uint8_t* at = tile + t * tile_bytes + g * 64;
      ahead.step();
      const __m512i codes = _mm512_loadu_si512(at);
      if constexpr (kNibbles) {
        const __m512i low = _mm512_and_si512(codes, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) dot(acc[r][t], low, q + r * q_stride + 8 * g);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) dot(acc[r][t], high, q + r * q_stride + 8 * g + 4);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) dot(acc[r][t], codes, q + r * q_stride + 4 * g);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    const KeyScales scales(p, part.chunk.page, kNibbles ? 0 : 1, token + 16 * t);
#pragma GCC unroll 8
    for (int r = 0; r < R / 2; ++r) {
      float* score = part.score + r * kScoreStride + 16 * (first + t);
      const float sum = part.row[r].sum[kNibbles ? 0 : 1];
      _mm512_storeu_ps(score, kNibbles ? scales.first(acc[r][t], acc[R / 2 + r][t], sum)
                                       : scales.add(_mm512_loadu_ps(score), acc[r][t], acc[R / 2 + r][t], sum));
    }
  }
}

// As many tiles at a time as the registers hold.
template <int R, bool kNibbles>
void key_part(const KeyPart& part, Prefetch& prefetch) {
  constexpr int together = R <= 4 ? 4 : R <= 8 ? 2 : 1;
  const int64_t tiles = part.chunk.tokens / kTokenTile;
  int64_t t = 0;
  for (; t + together <= tiles; t += together) key_products<R, together, kNibbles>(part, t, prefetch);
  for (; t < tiles; ++t) key_products<R, 1, kNibbles>(part, t, prefetch);
}

// out[r · width + lane] = Σ over the chunk's tokens of V's codes · weight for NV vectors of lanes; the high nibbles'
// results follow `nibble_width` later.
template <int R, int NV, bool kNibbles>
void value_products(const uint8_t* quad, int64_t quad_bytes, int64_t quads, const int8_t* weight, int32_t* out,
                    int64_t width, int64_t nibble_width, Prefetch& prefetch) {
  constexpr int kFields = kNibbles ? 2 : 1;
  __m512i acc[R][NV][kFields];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 2
      for (int f = 0; f < kFields; ++f) acc[r][v][f] = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(15);
  Prefetch::Steps ahead(prefetch);
  for (int64_t i = 0; i < quads; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const uint8_t* at = quad + i * quad_bytes + v * 64;
      ahead.step();
      const __m512i codes = _mm512_loadu_si512(at);
      if constexpr (kNibbles) {
        const __m512i low = _mm512_and_si512(codes, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dot(acc[r][v][0], low, weight + r * kRowStride + 4 * i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dot(acc[r][v][kFields - 1], high, weight + r * kRowStride + 4 * i);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dot(acc[r][v][0], codes, weight + r * kRowStride + 4 * i);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 2
      for (int f = 0; f < kFields; ++f)
        _mm512_storeu_si512(out + r * width + f * nibble_width + 16 * v, acc[r][v][f]);
}

class VpdpbusdProducts {
 public:
  VpdpbusdProducts(const PageLayout& page, const DecodeShape& shape, void*, Prefetch& prefetch)
      : page_(page), shape_(shape), prefetch_(prefetch) {}
  static int64_t scratch_bytes(const DecodeShape&) { return 0; }

  // Of the prefetch, on a whole chunk: one for every vector of codes.
  static int64_t prefetch_steps(const PageLayout& p, const DecodeShape& s) {
    const int64_t keys = p.low_padded / 8 + p.high_padded / 4, values = s.low_lanes + s.high_lanes;
    return keys * (kChunk / kTokenTile) + values * (kChunk / 4);
  }

  void scores(const Chunk& chunk, const PassOperands& n) const {
    switch (shape_.rows) {
      case 1: return rows_scores<2>(chunk, n);
      case 2: return rows_scores<4>(chunk, n);
      case 3: return rows_scores<6>(chunk, n);
      case 4: return rows_scores<8>(chunk, n);
      case 5: return rows_scores<10>(chunk, n);
      case 6: return rows_scores<12>(chunk, n);
      case 7: return rows_scores<14>(chunk, n);
      default: return rows_scores<16>(chunk, n);
    }
  }

  void outputs(const Chunk& chunk, const PassOperands& n, int32_t* out) const {
    const int64_t bytes = 2 * shape_.rows;
    for (int64_t r = 0; r < bytes; r += 8) {
      switch (min(bytes - r, int64_t{8})) {
        case 2: rows_outputs<2>(chunk, n, r, out); break;
        case 4: rows_outputs<4>(chunk, n, r, out); break;
        case 6: rows_outputs<6>(chunk, n, r, out); break;
        default: rows_outputs<8>(chunk, n, r, out); break;
      }
    }
  }

 private:
  template <int R>
  void rows_scores(const Chunk& chunk, const PassOperands& n) const {
    const auto part = [&](const int8_t* q) {
      return KeyPart{page_, chunk, q, shape_.query_bytes, n.row, n.score};
    };
    key_part<R, true>(part(n.query), prefetch_);
    if (page_.high) key_part<R, false>(part(n.query + shape_.low_bytes), prefetch_);
  }

  template <int R>
  void rows_outputs(const Chunk& chunk, const PassOperands& n, int64_t first, int32_t* output) const {
    constexpr int together = R <= 4 ? 2 : 1;
    const int64_t quads = chunk.tokens / 4, quad = chunk.token / 4;
    const int64_t low_quad = page_.low_padded * 2, high_quad = page_.high_padded * 4;
    const int8_t* low_weight = n.weight[0] + first * kRowStride;
    int32_t* out = output + first * shape_.width;
    const int64_t width = shape_.width, nibble_width = 16 * shape_.low_lanes;
    const uint8_t* low = chunk.page + page_.value_low + quad * low_quad;
    int64_t v = 0;
    for (; v + together <= shape_.low_lanes; v += together)
      value_products<R, together, true>(low + v * 64, low_quad, quads, low_weight, out + 16 * v, width, nibble_width,
                                        prefetch_);
    for (; v < shape_.low_lanes; ++v)
      value_products<R, 1, true>(low + v * 64, low_quad, quads, low_weight, out + 16 * v, width, nibble_width,
                                        prefetch_);
    const uint8_t* high = chunk.page + page_.value_high + quad * high_quad;
    for (v = 0; v < shape_.high_lanes; ++v)
      value_products<R, 1, false>(high + v * 64, high_quad, quads, n.weight[1] + first * kRowStride,
                                  out + 2 * nibble_width + 16 * v, width, 0, prefetch_);
  }

  const PageLayout& page_;
  const DecodeShape& shape_;
  Prefetch& prefetch_;
};

}  // namespace
}  // namespace resq
