// Scores of one query row and a chunk of keys -> probabilities times V's scales, in 14 bits.
//
// With q = unit · (128·qh + ql) the score is unit · Σ over the parts of scale[t] · (128·Ih + Il − zero[t] · Σq), of which
// KeyScales makes all but the unit where the integers come about: kept for two chunks they took 37 KiB of the L1 cache,
// and GQA 8 12 % more time. The weight of a value is p[t] · scale[t], held as a multiple of (largest scale of the
// chunk)/16383: p is relative to the chunk's own maximum, so every chunk uses all 14 bits whatever a sink elsewhere
// weighs. Error of the output: 3e-5 of the weights, where P in bf16 leaves 2e-3.
#pragma once

#include "convert.h"
#include "exp2.h"
#include "lanes.h"
#include "prefetch.h"

namespace resq {
namespace {

constexpr int64_t kChunk = 128;  // tokens, at most; a chunk lies within a page
// Elements between rows of weights and of scores: off a power of 2, so that rows and buffers do not lie 4096 bytes
// apart, where a load waits for any recent store.
constexpr int64_t kRowStride = kChunk + 64, kScoreStride = kChunk + 16;
constexpr int32_t kQueryLevels = 127 * 128 + 63;    // qh in [-127, 127], ql in [-64, 63]
constexpr int32_t kWeightLevels = 127 * 128 + 127;  // both bytes in [0, 127]
constexpr float kLowest = -3e38f;                   // score of a key that is not seen, in units of q's codes

// Of V.
struct ChunkScales {
  alignas(64) float value[2][kChunk];         // scale / value_unit
  alignas(64) uint8_t value_zero[2][kChunk];  // 0 beyond the chunk's tokens
  float value_unit[2];
};

RESQ_INLINE __m512 load_zeros(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Of a part of 16 keys. Those that were never written give any score: no row sees them.
struct KeyScales {
  __m512 scale, zero;  // zero: scale · zero point

  KeyScales(const PageLayout& p, const uint8_t* page, int64_t part, int64_t token)
      : scale((__m512)load_half(reinterpret_cast<const uint16_t*>(page + p.scales) + part * p.tokens + token)),
        zero(_mm512_mul_ps(scale, load_zeros(page + p.zeros + part * p.tokens + token))) {}

  // Scores of the first part, from the products with q's high and low bytes, and with those of a further part.
  RESQ_INLINE __m512 first(__m512i high, __m512i low, float query_sum) const {
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(query_sum), _mm512_mul_ps(product(high, low), scale));
  }
  RESQ_INLINE __m512 add(__m512 before, __m512i high, __m512i low, float query_sum) const {
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(query_sum), _mm512_fmadd_ps(product(high, low), scale, before));
  }
  // The same from 128 · high + low as one.
  RESQ_INLINE __m512 first(__m512i both, float query_sum) const {
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(query_sum), _mm512_mul_ps(_mm512_cvtepi32_ps(both), scale));
  }
  RESQ_INLINE __m512 add(__m512 before, __m512i both, float query_sum) const {
    return _mm512_fnmadd_ps(zero, _mm512_set1_ps(query_sum), _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, before));
  }

 private:
  RESQ_INLINE static __m512 product(__m512i high, __m512i low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
  }
};

// Tokens [valid, tokens) get scale 0: what lies there may never have been written.
void load_chunk_scales(const PageLayout& p, const uint8_t* page, int64_t token, int64_t tokens, int64_t valid,
                       ChunkScales& out) {
  const auto mask_of = [&](int64_t t) {
    const int64_t n = valid - t;
    return static_cast<__mmask16>(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1);
  };
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t at = (p.parts + part) * p.tokens + token;
    const uint16_t* value = reinterpret_cast<const uint16_t*>(page + p.scales) + at;
    const uint8_t* value_zero = page + p.zeros + at;
    __m512 highest = _mm512_setzero_ps();
    for (int64_t t = 0; t < tokens; t += 16) {
      const __m512 v = _mm512_maskz_mov_ps(mask_of(t), (__m512)load_half(value + t));
      _mm512_store_ps(out.value[part] + t, v);
      _mm_store_si128(reinterpret_cast<__m128i*>(out.value_zero[part] + t),
                      _mm_loadu_si128(reinterpret_cast<const __m128i*>(value_zero + t)));
      highest = _mm512_max_ps(highest, v);
    }
    for (int64_t t = tokens; t < round_up(tokens, 64); t += 16)
      _mm_store_si128(reinterpret_cast<__m128i*>(out.value_zero[part] + t), _mm_setzero_si128());
    const float unit = _mm512_reduce_max_ps(highest) * (1.0f / kWeightLevels);
    // The last float below 1/unit, so that no weight exceeds the levels by rounding.
    const float inverse = unit > 0.0f ? 0.9999999f / unit : 0.0f;
    out.value_unit[part] = unit > 0.0f ? 1.0f / inverse : 0.0f;
    for (int64_t t = 0; t < tokens; t += 16) {
      float* value = out.value[part] + t;
      _mm512_store_ps(value, _mm512_mul_ps(_mm512_load_ps(value), _mm512_set1_ps(inverse)));
    }
  }
}

struct QueryRow {
  float unit;    // of the codes; the softmax scale and log2 e included
  float sum[2];  // Σ of a part's codes
};

// Queries this small are as good as 0: their scores differ by less than float32 can say.
constexpr float kSmallestQuery = 1e-20f;

// One part of a query, n values -> two bytes a value, zeros up to a multiple of 64, and the sum of the codes.
RESQ_INLINE float quantize_query_part(const float* x, int64_t n, float inverse, int8_t* high, int8_t* low) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load_part(x + i, n - i), _mm512_set1_ps(inverse)));
    q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_set1_epi32(-kQueryLevels)), _mm512_set1_epi32(kQueryLevels));
    total = _mm512_add_epi32(total, q);
    const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
    const __m512i l = _mm512_sub_epi32(q, _mm512_slli_epi32(h, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(h));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(l));
  }
  for (int64_t i = round_up(n, 16); i < round_up(n, 64); i += 16)
    for (int8_t* to : {high + i, low + i}) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_setzero_si128());
  return static_cast<float>(_mm512_reduce_add_epi32(total));
}

// A query of head_dim values; its high part follows at byte `low_bytes`.
void quantize_query(const float* x, const PageLayout& p, int64_t low_bytes, float scale, int8_t* high, int8_t* low,
                    QueryRow& row) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < p.head_dim; i += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps((__m512)load_part(x + i, p.head_dim - i)));
  const float amax = _mm512_reduce_max_ps(largest);
  const float unit = amax > kSmallestQuery ? amax / kQueryLevels : 1.0f, inverse = 1.0f / unit;
  row.unit = unit * scale;
  row.sum[0] = quantize_query_part(x, p.low, inverse, high, low);
  row.sum[1] = quantize_query_part(x + p.low, p.high, inverse, high + low_bytes, low + low_bytes);
}

// 64 weights, 14 bits each in order of the tokens -> their high and low 7 bits as bytes.
RESQ_INLINE void split_weights(const __m512i w[4], __m512i& high, __m512i& low) {
  const __m512i a = _mm512_packus_epi32(w[0], w[1]), b = _mm512_packus_epi32(w[2], w[3]);
  const __m512i mask = _mm512_set1_epi16(127);
  const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
  const __m512i highs = _mm512_packus_epi16(_mm512_srli_epi16(a, 7), _mm512_srli_epi16(b, 7));
  // Packing works within 128-bit lanes: quad 4i + l of the tokens is now word 4l + i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  high = _mm512_permutexvar_epi32(order, highs);
  low = _mm512_permutexvar_epi32(order, lows);
}

// Where one row's operands lie. weight: [0] low part, [1] high part; then its high and low byte.
struct RowOperands {
  const float* score;  // without the row's unit
  int8_t* weight[2][2];
};

struct RowSums {
  __m512 denominator;  // lanes to be added
  __m512 zero[2];      // Σ weight · zero point, lanes to be added
  float highest;       // in powers of 2
  bool seen;           // any key of the chunk
};

constexpr int64_t kSoftmaxSteps = 10;  // of the prefetch, for a row of a whole chunk

// A row's scores of 16·N tokens, of which [begin, end) are seen.
template <int N>
RESQ_INLINE void load_scores(__m512 (&score)[N], const float* from, int64_t begin, int64_t end,
                             Prefetch::Steps& ahead) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    ahead.step();
    score[i] = _mm512_loadu_ps(from + 16 * i);
  }
  if (begin <= 0 && end >= 16 * N) return;
  const __m512i first = key_bound(begin, kChunk), last = key_bound(end, kChunk);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kLowest), keys_seen(16 * i, first, last), score[i]);
}

template <int N>
RESQ_INLINE __m512 highest_lanes(const __m512 (&score)[N]) {
  __m512 highest = score[0];
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) highest = _mm512_max_ps(highest, score[i]);
  return highest;
}

// Scores -> weights, their denominator and what they add of zero points.
template <int N, int kParts>
RESQ_INLINE void weigh_scores(__m512 (&score)[N], const ChunkScales& s, const QueryRow& row, const RowOperands& at,
                              RowSums& sums, Prefetch::Steps& ahead) {
  sums.denominator = sums.zero[0] = sums.zero[1] = _mm512_setzero_ps();
  if (!sums.seen) {
    for (int part = 0; part < kParts; ++part)
      for (int half = 0; half < 2; ++half) __builtin_memset(at.weight[part][half], 0, (N + 3) / 4 * 64);
    return;
  }
  const __m512 unit = _mm512_set1_ps(row.unit), reference = _mm512_set1_ps(sums.highest);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    score[i] = exp2_negative(_mm512_fmsub_ps(score[i], unit, reference));
    sums.denominator = _mm512_add_ps(sums.denominator, score[i]);
    if (i % 4 == 1) ahead.step();
  }
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    __m512i zero_high = _mm512_setzero_si512(), zero_low = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int j = 0; j < N; j += 4) {
      __m512i weight[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (j + i >= N) {
          weight[i] = _mm512_setzero_si512();
          continue;
        }
        weight[i] = _mm512_cvtps_epi32(_mm512_mul_ps(score[j + i], _mm512_load_ps(s.value[part] + 16 * (j + i))));
      }
      __m512i high, low;
      split_weights(weight, high, low);
      _mm512_store_si512(at.weight[part][0] + 16 * j, high);
      _mm512_store_si512(at.weight[part][1] + 16 * j, low);
      const __m512i zero_point = _mm512_load_si512(s.value_zero[part] + 16 * j);
      zero_high = _mm512_dpbusd_epi32(zero_high, zero_point, high);
      zero_low = _mm512_dpbusd_epi32(zero_low, zero_point, low);
    }
    sums.zero[part] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(zero_high, 7), zero_low));
  }
}

// One row's chunk of 16·N tokens, of which [begin, end) are seen.
template <int N, int kParts>
void softmax_chunk(const ChunkScales& s, const QueryRow& row, const RowOperands& at, int64_t begin, int64_t end,
                   RowSums& sums, Prefetch& prefetch) {
  __m512 score[N];
  Prefetch::Steps ahead(prefetch);
  load_scores(score, at.score, begin, end, ahead);
  const float largest = _mm512_reduce_max_ps(highest_lanes(score));
  sums.highest = largest * row.unit;
  sums.seen = largest > kLowest;
  weigh_scores<N, kParts>(score, s, row, at, sums, ahead);
}

// The same in two steps, between which the maxima of all rows are known.
template <int N>
void find_highest(const RowOperands& at, int64_t begin, int64_t end, __m512& highest, Prefetch& prefetch) {
  __m512 score[N];
  Prefetch::Steps ahead(prefetch);
  load_scores(score, at.score, begin, end, ahead);
  highest = highest_lanes(score);
}

template <int N, int kParts>
void weigh_chunk(const ChunkScales& s, const QueryRow& row, const RowOperands& at, int64_t begin, int64_t end,
                 RowSums& sums, Prefetch& prefetch) {
  __m512 score[N];
  Prefetch::Steps ahead(prefetch);
  load_scores(score, at.score, begin, end, ahead);
  weigh_scores<N, kParts>(score, s, row, at, sums, ahead);
}

// The largest lane of each of eight vectors.
RESQ_INLINE __m256 reduce_rows(const __m512 (&lanes)[8]) {
  __m256 pair[4], quad[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m256 of[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      of[j] = _mm256_max_ps(_mm512_castps512_ps256(lanes[2 * i + j]), _mm512_extractf32x8_ps(lanes[2 * i + j], 1));
    pair[i] = _mm256_max_ps(_mm256_unpacklo_ps(of[0], of[1]), _mm256_unpackhi_ps(of[0], of[1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = (__m256d)pair[2 * i], b = (__m256d)pair[2 * i + 1];
    quad[i] = _mm256_max_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
  }
  return _mm256_max_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

}  // namespace
}  // namespace resq
