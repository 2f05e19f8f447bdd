// The products of decode.h with vpdpbusd, on the packed codes as they lie in the page.
//
// Products with the high bytes (of q, of the weights) come first; shifted into place, those with the low bytes add to
// them. That halves the accumulators, so that a word that was loaded meets two vectors of codes or more: with a word
// loaded for every vpdpbusd it starts every 1.13 clocks on Zen 4, else every clock.
#pragma once

#include "decode.h"

namespace resq {
namespace {

// Whole vectors of lanes, and half a one where that is enough: it takes half the time on Zen 4.
template <class V>
RESQ_INLINE V load_codes(const uint8_t* p) {
  if constexpr (sizeof(V) == 64) {
    return _mm512_loadu_si512(p);
  } else {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
}

template <class V>
RESQ_INLINE V broadcast(const int8_t* word) {
  const int value = *reinterpret_cast<const IntMem*>(word);
  if constexpr (sizeof(V) == 64) {
    return _mm512_set1_epi32(value);
  } else {
    return _mm256_set1_epi32(value);
  }
}

// acc += Σ over 4 bytes of u8 code · s8; in assembly for the reason that micro_avx512.h gives.
template <class V>
RESQ_INLINE void dot(V& acc, V codes, V word) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(word));
}

RESQ_INLINE __m512i low_nibbles(__m512i codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
RESQ_INLINE __m256i low_nibbles(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
RESQ_INLINE __m512i high_nibbles(__m512i codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
RESQ_INLINE __m256i high_nibbles(__m256i codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }
RESQ_INLINE __m512i shift_high(__m512i x) { return _mm512_slli_epi32(x, 7); }
RESQ_INLINE __m256i shift_high(__m256i x) { return _mm256_slli_epi32(x, 7); }
RESQ_INLINE __m512i add_words(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
RESQ_INLINE __m256i add_words(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }

// Rows whose two bytes are multiplied in one go: so few leave accumulators to spare, and reading and unpacking the codes
// twice costs more than the words do (0.86 of the speed with one row and head_dim 128).
constexpr int kFewRows = 2;

template <int M>
constexpr int kByteRows = M <= kFewRows ? 2 * M : M;

// acc[r] = Σ of codes · (128 · high + low byte) for M rows. add(acc, low) adds the products with kByteRows rows of bytes
// to it: the high bytes first, then, where they have a turn of their own, the low ones.
template <int M, class V, int R, int N, class F>
RESQ_INLINE void add_both_bytes(V (&acc)[R][N], const F& add) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = V{};
  add(acc, false);
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      acc[r][n] = shift_high(acc[r][n]);
      if constexpr (R > M) acc[r][n] = add_words(acc[r][n], acc[M + r][n]);
    }
  if constexpr (R == M) add(acc, true);
}

// A part of K, and where the scores go.
struct KeyPart {
  const PageLayout& page;
  const Chunk& chunk;
  const int8_t* q;  // [2 rows, q_stride]
  int64_t q_stride;
  const QueryRow* row;  // [rows]
  float* score;         // [rows, kScoreStride]
};

// acc[r][t] += codes of NT tiles of 16 tokens times M rows of bytes of q.
template <bool kNibbles, int M, int NT>
RESQ_INLINE void add_key_products(__m512i (&acc)[M][NT], const uint8_t* tile, int64_t words, const int8_t* q,
                                  int64_t q_stride, Prefetch::Steps& ahead) {
  const int64_t tile_bytes = 64 * words;
  for (int64_t g = 0; g < words; ++g) {
    __m512i codes[NT], high[NT];
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      ahead.step();
      codes[t] = load_codes<__m512i>(tile + t * tile_bytes + g * 64);
      if constexpr (kNibbles) {
        high[t] = high_nibbles(codes[t]);
        codes[t] = low_nibbles(codes[t]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const int8_t* words_of_row = q + r * q_stride + (kNibbles ? 8 : 4) * g;
      const __m512i word = broadcast<__m512i>(words_of_row);
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) dot(acc[r][t], codes[t], word);
      if constexpr (kNibbles) {
        const __m512i next = broadcast<__m512i>(words_of_row + 4);
#pragma GCC unroll 8
        for (int t = 0; t < NT; ++t) dot(acc[r][t], high[t], next);
      }
    }
  }
}

// Scores of M rows and NT tiles from `first` on: those of the low part (nibbles) are stored, the high part's added. Not
// inlined: among the other kernels' code g++ 12 keeps accumulators on the stack.
template <int M, int NT, bool kNibbles>
__attribute__((noinline)) void key_products(const KeyPart& part, int64_t first, Prefetch& prefetch) {
  const PageLayout& p = part.page;
  const int64_t words = kNibbles ? p.low_padded / 8 : p.high_padded / 4;
  const int64_t token = part.chunk.token + 16 * first;
  const uint8_t* tile = part.chunk.page + (kNibbles ? p.key_low : p.key_high) + token / kTokenTile * 64 * words;
  __m512i acc[kByteRows<M>][NT];
  Prefetch::Steps ahead(prefetch);
  add_both_bytes<M>(acc, [&](auto& to, bool low) __attribute__((always_inline)) {
    add_key_products<kNibbles>(to, tile, words, part.q + (low ? M : 0) * part.q_stride, part.q_stride, ahead);
  });
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    const KeyScales scales(p, part.chunk.page, kNibbles ? 0 : 1, token + 16 * t);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      float* score = part.score + r * kScoreStride + 16 * (first + t);
      const float sum = part.row[r].sum[kNibbles ? 0 : 1];
      _mm512_storeu_ps(score, kNibbles ? scales.first(acc[r][t], sum)
                                       : scales.add(_mm512_loadu_ps(score), acc[r][t], sum));
    }
  }
}

// As many tiles at a time as the registers hold.
template <int M, bool kNibbles>
void key_part(const KeyPart& part, Prefetch& prefetch) {
  constexpr int together = M <= 4 ? 4 : 2;
  const int64_t tiles = part.chunk.tokens / kTokenTile;
  int64_t t = 0;
  for (; t + together <= tiles; t += together) key_products<M, together, kNibbles>(part, t, prefetch);
  for (; t < tiles; ++t) key_products<M, 1, kNibbles>(part, t, prefetch);
}

// V's codes of a chunk, from some lane on, and where they are added.
struct ValuePart {
  const uint8_t* quad;
  int64_t quad_bytes, quads;
  const int8_t* weight;        // [2 rows, kRowStride]
  const ChunkFactors* factor;  // [rows]
  float unit;                  // of the weights
  float* sum;                  // [rows, width], the high nibbles' lanes `nibble_width` later
  int64_t width, nibble_width;
};

RESQ_INLINE void add_products(float* sum, __m512i products, float shrink, float unit) {
  const __m512 shrunk = _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(shrink));
  _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(unit), shrunk));
}
RESQ_INLINE void add_products(float* sum, __m256i products, float shrink, float unit) {
  const __m256 shrunk = _mm256_mul_ps(_mm256_loadu_ps(sum), _mm256_set1_ps(shrink));
  _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(unit), shrunk));
}

// acc[r][n] += V's codes · M rows of bytes of the weights, over all quads. n: vectors, each with both its nibbles.
template <bool kNibbles, class V, int M, int N>
RESQ_INLINE void add_value_products(V (&acc)[M][N], const ValuePart& part, const int8_t* weight,
                                    Prefetch::Steps& ahead) {
  constexpr int kFields = kNibbles ? 2 : 1;
  const uint8_t* quad = part.quad;
  for (int64_t i = 0; i < part.quads; ++i, quad += part.quad_bytes, weight += 4) {
    V codes[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n += kFields) {
      ahead.step();
      codes[n] = load_codes<V>(quad + n / kFields * sizeof(V));
      if constexpr (kNibbles) {
        codes[n + 1] = high_nibbles(codes[n]);
        codes[n] = low_nibbles(codes[n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const V word = broadcast<V>(weight + r * kRowStride);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) dot(acc[r][n], codes[n], word);
    }
  }
}

// sum = sum · shrink + Σ over the chunk's tokens of V's codes · weight, for NV vectors of lanes.
template <int M, int NV, class V, bool kNibbles>
__attribute__((noinline)) void value_products(const ValuePart& part, Prefetch& prefetch) {
  constexpr int kFields = kNibbles ? 2 : 1;
  V acc[kByteRows<M>][NV * kFields];
  Prefetch::Steps ahead(prefetch);
  add_both_bytes<M>(acc, [&](auto& to, bool low) __attribute__((always_inline)) {
    add_value_products<kNibbles>(to, part, part.weight + (low ? M : 0) * kRowStride, ahead);
  });
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NV * kFields; ++n)
      add_products(part.sum + r * part.width + n % kFields * part.nibble_width + n / kFields * (sizeof(V) / 4),
                   acc[r][n], part.factor[r].shrink, part.factor[r].weight * part.unit);
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
    with_constant(shape_.rows, [&](auto rows) { rows_scores<rows.value>(chunk, n); });
  }

  // To the rows' sums [rows, width], straight from registers.
  void add_outputs(const Chunk& chunk, const PassOperands& n, const ChunkFactors* factors, const float* value_unit,
                   float* sum) const {
    with_constant(shape_.rows,
                  [&](auto rows) { rows_outputs<rows.value>(chunk, n, factors, value_unit, sum); });
  }

 private:
  template <int M>
  void rows_scores(const Chunk& chunk, const PassOperands& n) const {
    const auto part = [&](const int8_t* q) {
      return KeyPart{page_, chunk, q, shape_.query_bytes, n.row, n.score};
    };
    key_part<M, true>(part(n.query), prefetch_);
    if (page_.high) key_part<M, false>(part(n.query + shape_.low_bytes), prefetch_);
  }

  // `lanes` of V: whole vectors, and half a one where that is enough for the last.
  template <int M, bool kNibbles>
  void part_outputs(ValuePart part, int64_t lanes) const {
    constexpr int together = M <= 4 ? 2 : 1;
    const auto take = [&](int64_t n) {
      part.quad += 4 * n;
      part.sum += n;
      lanes -= n;
    };
    for (; lanes > 16 * together - 8; take(16 * together))
      value_products<M, together, __m512i, kNibbles>(part, prefetch_);
    for (; lanes > 8; take(16)) value_products<M, 1, __m512i, kNibbles>(part, prefetch_);
    if (lanes > 0) value_products<M, 1, __m256i, kNibbles>(part, prefetch_);
  }

  template <int M>
  void rows_outputs(const Chunk& chunk, const PassOperands& n, const ChunkFactors* factors, const float* value_unit,
                    float* sum) const {
    const int64_t quads = chunk.tokens / 4, quad = chunk.token / 4, nibble_width = 16 * shape_.low_lanes;
    const int64_t low_quad = page_.low_padded * 2, high_quad = page_.high_padded * 4;
    part_outputs<M, true>({chunk.page + page_.value_low + quad * low_quad, low_quad, quads, n.weight[0], factors,
                           value_unit[0], sum, shape_.width, nibble_width},
                          page_.low_padded / 2);
    part_outputs<M, false>({chunk.page + page_.value_high + quad * high_quad, high_quad, quads, n.weight[1], factors,
                            value_unit[1], sum + 2 * nibble_width, shape_.width, 0},
                           page_.high_padded);
  }

  const PageLayout& page_;
  const DecodeShape& shape_;
  Prefetch& prefetch_;
};

}  // namespace
}  // namespace resq
