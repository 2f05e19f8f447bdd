// One head of 16 tokens, transposed: tokens become vector lanes.
#pragma once

#include "convert.h"

namespace resq {
namespace {

// 16 vectors of 16 words, transposed.
RESQ_INLINE void transpose_words(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// One head of 16 tokens in the caller's dtype.
struct HeadRows {
  const void* x;
  DType dtype;
  int64_t stride, dim;  // elements between tokens, of a head
};

// Pairs of bfloat16 dims: pairs[16 · i + token] = dims 2i, 2i + 1; 0 beyond the head, up to a multiple of 32 dims.
void load_pairs(const HeadRows& h, uint32_t* pairs) {
  for (int64_t first = 0; first < h.dim; first += 32) {
    const int64_t left = h.dim - first;
    const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    __m512i r[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t)
      r[t] = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(h.x) + t * h.stride + first);
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(pairs + (first / 2 + i) * 16, r[i]);
  }
}

// to[16 · dim + token] in float32, for dims up to a multiple of 32. `pairs`: scratch, and where bfloat16 pairs stay.
void load_lanes(const HeadRows& h, uint32_t* pairs, float* to) {
  if (h.dtype == DType::bf16) {
    load_pairs(h, pairs);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (int64_t i = 0; i < h.dim; i += 2) {
      const __m512i both = _mm512_load_si512(pairs + i * 8);
      _mm512_store_si512(to + i * 16, _mm512_slli_epi32(both, 16));
      _mm512_store_si512(to + (i + 1) * 16, _mm512_and_si512(both, high));
    }
    return;
  }
  for (int64_t first = 0; first < h.dim; first += 16) {
    const int64_t left = h.dim - first;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1 << left) - 1);
    __m512i r[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) {
      const void* row = element(h.x, h.dtype, t * h.stride + first);
      r[t] = h.dtype == DType::f32 ? _mm512_maskz_loadu_epi32(mask, row)
                                   : (__m512i)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row));
    }
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (first + i) * 16, r[i]);
  }
}

}  // namespace
}  // namespace resq
