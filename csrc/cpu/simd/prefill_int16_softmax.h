// Scores of a panel of query rows -> int16 weights, each row's relative to the largest of its block.
//
// V's low scale is part of the exponent: a score becomes t = log2(P · scale) but for the row's reference, so the
// largest t of a row and block gives the largest weight, and the denominator divides by the scales again.
#pragma once

#include "exp2.h"
#include "int16_products.h"
#include "prefill_int16_unpack.h"

namespace resq {
namespace {

constexpr int64_t kRowGroup = 12;  // rows that see equally many keys, but for masks
constexpr int64_t kPanelGroups = 4;
constexpr int64_t kInt16Rows = kRowGroup * kPanelGroups;  // of a panel, a multiple of 16

struct alignas(64) Int16Panel {
  float score[kInt16Rows * kInt16Keys];  // t
  int16_t low_weight[kInt16Rows * kInt16Keys], high_weight[kInt16Rows * kInt16Keys];
  float highest[kInt16Rows * 16];  // lanes of t's maximum
  // Of every row: that maximum; what the sums so far are worth in the new reference, and a weight of 1 of this block.
  float block_max[kInt16Rows], shrink[kInt16Rows], unit[kInt16Rows];
  int32_t seen_begin[kInt16Rows], seen_end[kInt16Rows];
  int64_t keys[kPanelGroups];  // that a group meets, in whole steps of 32
};

struct ScoreRows {
  const int16_t* query;
  const float* row_scale;
  int64_t key;  // the first of the strip
};

// kDotRows rows from `row` of the panel on, against V tiles of 16 keys.
template <int V, bool kMasked>
__attribute__((noinline)) void score_rows(const Int16Shape& s, const Int16Block& b, const ScoreRows& x, int64_t row,
                                          Int16Panel& panel) {
  alignas(64) float low[kDotRows][16 * V];
  const uint8_t* key = b.key + x.key / 16 * s.key_bytes;
  const int16_t* query = x.query + row * s.query_words;
  const Int16Scales& scales = *b.scales;
  __m512i acc[kDotRows][V];
  dot_pairs<kDotRows, V>(acc, query, s.query_words, key, s.key_bytes, s.low_pairs);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 scale = _mm512_load_ps(scales.key_low + x.key + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < kDotRows; ++r)
      _mm512_store_ps(low[r] + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), scale));
  }
  dot_pairs<kDotRows, V>(acc, query + 2 * s.low_pairs, s.query_words, key + s.low_pairs * 64, s.key_bytes,
                         s.high_pairs);
  __m512 scale[V], log2[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    scale[v] = _mm512_load_ps(scales.key_high + x.key + 16 * v);
    log2[v] = _mm512_load_ps(scales.value_log2 + x.key + 16 * v);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kDotRows; ++r) {
    const __m512 row_scale = _mm512_set1_ps(x.row_scale[row + r]);
    float* highest = panel.highest + 16 * (row + r);
    __m512 best = _mm512_load_ps(highest);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      __m512 t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][v]), scale[v], _mm512_load_ps(low[r] + 16 * v));
      t = _mm512_fmadd_ps(t, row_scale, log2[v]);
      if constexpr (kMasked) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(x.key) + 16 * v));
        const __mmask16 seen =
            _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(panel.seen_begin[row + r])), at,
                                         _mm512_set1_epi32(panel.seen_end[row + r]));
        t = _mm512_mask_mov_ps(_mm512_set1_ps(kUnseenKey), seen, t);
      }
      best = _mm512_max_ps(best, t);
      _mm512_store_ps(panel.score + (row + r) * kInt16Keys + x.key + 16 * v, t);
    }
    _mm512_store_ps(highest, best);
  }
}

// The largest of each of 16 vectors.
RESQ_INLINE __m512 largest_of_each(const float* x) {
  __m512 pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // vectors i and i + 8
    const __m512 a = _mm512_load_ps(x + 16 * i), b = _mm512_load_ps(x + 16 * (i + 8));
    pairs[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // i, i + 4, i + 8, i + 12 in 128-bit lanes
    fours[i] = _mm512_max_ps(_mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0x88),
                             _mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0xDD));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_max_ps(_mm512_unpacklo_ps(fours[i], fours[i + 2]), _mm512_unpackhi_ps(fours[i], fours[i + 2]));
  const __m512 all = _mm512_max_ps(_mm512_unpacklo_ps(eights[0], eights[1]), _mm512_unpackhi_ps(eights[0], eights[1]));
  // Lane 4a + i holds vector i + 4·(0, 2, 1, 3)[a].
  return _mm512_shuffle_f32x4(all, all, 0xD8);
}

// New references of the panel's rows.
void relate_rows(int64_t count, float* row_max, Int16Panel& panel) {
  for (int64_t r = 0; r < count; r += 16) {
    const __m512 block = largest_of_each(panel.highest + 16 * r), old = _mm512_loadu_ps(row_max + r);
    const __m512 reference = _mm512_max_ps(old, block);
    _mm512_store_ps(panel.block_max + r, block);
    _mm512_store_ps(panel.shrink + r, exp2_negative(_mm512_sub_ps(old, reference)));
    _mm512_store_ps(panel.unit + r, _mm512_mul_ps(exp2_negative(_mm512_sub_ps(block, reference)),
                                                  _mm512_set1_ps(1.0f / kLargestWord)));
    _mm512_storeu_ps(row_max + r, reference);
  }
}

// Weights of row r of the panel, and their part in its denominator.
template <bool kMasked>
void weigh_row(const Int16Scales& s, int64_t keys, int64_t r, float* denominator, Int16Panel& panel) {
  const float* score = panel.score + r * kInt16Keys;
  int16_t *low = panel.low_weight + r * kInt16Keys, *high = panel.high_weight + r * kInt16Keys;
  const __m512 reference = _mm512_set1_ps(panel.block_max[r]);
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < keys; i += 32) {
    __m512i codes[2], high_codes[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 t = _mm512_load_ps(score + i + 16 * j);
      __m512 weight = exp2_negative(_mm512_sub_ps(t, reference), kLargestWord);
      // A row that sees nothing of the block has kUnseenKey as its reference, too.
      if constexpr (kMasked)
        weight = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(0.5f * kUnseenKey), _CMP_GT_OQ), weight);
      total[j] = _mm512_fmadd_ps(weight, _mm512_load_ps(s.value_inverse + i + 16 * j), total[j]);
      codes[j] = _mm512_cvtps_epi32(weight);
      high_codes[j] = _mm512_cvtps_epi32(_mm512_mul_ps(weight, _mm512_load_ps(s.value_ratio + i + 16 * j)));
    }
    _mm512_store_si512(low + i, _mm512_packs_epi32(codes[0], codes[1]));
    _mm512_store_si512(high + i, _mm512_packs_epi32(high_codes[0], high_codes[1]));
  }
  const __m512 kept = _mm512_mul_ps(_mm512_load_ps(denominator), _mm512_set1_ps(panel.shrink[r]));
  _mm512_store_ps(denominator,
                  _mm512_fmadd_ps(_mm512_add_ps(total[0], total[1]), _mm512_set1_ps(panel.unit[r]), kept));
}

}  // namespace
}  // namespace resq
