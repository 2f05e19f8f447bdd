// Integer micro-kernels for AVX2, 1 or 2 tokens at a time: with AVX-VNNI, or by pairs of int16 products.
//
// Without VNNI: vpmaddubsw saturates at 2^15, so it is used only where two products stay below: nibble weights
// (2·15·128) and 4-bit activations (2·255·15). Bytes against bytes are widened to int16 first.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr int kMicroRows = 6;
template <Reading, int>
constexpr int kAbreast = 1;

RESQ_INLINE __m256i broadcast_word(const int8_t* p) {
  return _mm256_set1_epi32(*reinterpret_cast<const IntMem*>(p));
}

RESQ_INLINE __m256i dot_safe(__m256i acc, __m256i weight, __m256i activation) {
#if defined(RESQ_VNNI)
  return _mm256_dpbusd_avx_epi32(acc, weight, activation);
#endif
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, activation), _mm256_set1_epi16(1)));
}

// MR tokens x 8·NV outputs, starting at vector `v0` of the superblock.
template <int MR, int NV>
RESQ_INLINE void nibbles_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  __m256i acc[MR][NV];
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + g * 256 + v * 32));
      const __m256i low = _mm256_and_si256(both, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
#pragma GCC unroll 2
      for (int m = 0; m < MR; ++m) {
        const int8_t* q = a + m * lda + g * 8;
        acc[m][v] = dot_safe(acc[m][v], low, broadcast_word(q));
        acc[m][v] = dot_safe(acc[m][v], high, broadcast_word(q + 4));
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * 64 + v * 8), acc[m][v]);
}

#if defined(RESQ_VNNI)
constexpr bool kVnni = true;  // no product saturates: bytes against bytes are as good as narrow ones
#else
constexpr bool kVnni = false;
#endif

template <int MR, int NV, bool kNarrow>
RESQ_INLINE void bytes_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  __m256i acc[MR][NV];
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; ++g) {
    __m256i even[MR], odd[MR];
#pragma GCC unroll 2
    for (int m = 0; m < MR; ++m) {
      const __m256i word = broadcast_word(a + m * lda + g * 4);
      even[m] = kNarrow || kVnni ? word : _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8);
      odd[m] = _mm256_srai_epi16(word, 8);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + g * 256 + v * 32));
      const __m256i low = _mm256_and_si256(weight, _mm256_set1_epi16(255));
      const __m256i high = _mm256_srli_epi16(weight, 8);
#pragma GCC unroll 2
      for (int m = 0; m < MR; ++m) {
        if (kNarrow || kVnni) {
          acc[m][v] = dot_safe(acc[m][v], weight, even[m]);
        } else {
          acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(low, even[m]));
          acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(high, odd[m]));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * 64 + v * 8), acc[m][v]);
}

// 16 registers hold 2 tokens x 4 vectors with their operands; one token takes the whole superblock, to read it once.
template <int MR>
void micro_nibbles(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  int m = 0;
  for (; m + 2 <= MR; m += 2)
    for (int half = 0; half < 2; ++half)
      nibbles_tile<2, 4>(w + half * 128, a + m * lda, lda, groups, out + m * 64 + half * 32);
  if (MR % 2) nibbles_tile<1, 8>(w, a + m * lda, lda, groups, out + m * 64);
}

template <int MR, bool kNarrow>
void micro_bytes(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  int m = 0;
  for (; m + 2 <= MR; m += 2)
    for (int half = 0; half < 2; ++half)
      bytes_tile<2, 4, kNarrow>(w + half * 128, a + m * lda, lda, groups, out + m * 64 + half * 32);
  if (MR % 2) bytes_tile<1, 8, kNarrow>(w, a + m * lda, lda, groups, out + m * 64);
}

}  // namespace
}  // namespace resq
