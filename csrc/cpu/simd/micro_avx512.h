// Integer micro-kernels for AVX-512 VNNI: up to 6 tokens x 64 output columns, unpacked in registers.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr int kMicroRows = 6;

// acc += Σ over 4 bytes of u8 weight · s8 activation, the activation word broadcast from memory. With the intrinsic,
// g++ 12 reloads and spills every accumulator; one instruction of inline assembly keeps them in registers.
RESQ_INLINE void dot(__m512i& acc, __m512i weight, const int8_t* activation) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(acc)
      : "v"(weight), "m"(*reinterpret_cast<const IntMem*>(activation)));
}

// Bytes between a weight's prefetch and its use. The processor's own prefetching stops at 4 KiB pages; asked for this far
// ahead, one core reads 12.2 instead of 11.3 GB/s (M = 1, 2 MiB pages; 1024 to 8192 are alike). More rows hide the wait.
constexpr int64_t kPrefetch = 2048;
constexpr int kPrefetchRows = 4;

// acc[m·64 + n] = Σ over groups of 8 columns, weights as nibbles: 4 vectors of 16 outputs per group, byte 4c + j of a
// vector holding column j of the group (low nibble) and column 4 + j (high nibble) for output c.
template <int MR>
__attribute__((noinline)) void micro_nibbles(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups,
                                             int32_t* out) {
  __m512i acc[MR][4];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* p = w + g * 256;
    const int8_t* q = a + g * 8;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i both = _mm512_loadu_si512(p + c * 64);
      if (MR <= kPrefetchRows) _mm_prefetch(p + c * 64 + kPrefetch, _MM_HINT_T0);
      const __m512i low = _mm512_and_si512(both, mask);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) dot(acc[m][c], low, q + m * lda);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) dot(acc[m][c], high, q + m * lda + 4);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + m * 64 + c * 16, acc[m][c]);
}

// The same with a byte per weight and groups of 4 columns. The width of the activations does not matter here.
template <int MR, bool kNarrow>
__attribute__((noinline)) void micro_bytes(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups,
                                           int32_t* out) {
  __m512i acc[MR][4];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* p = w + g * 256;
    const int8_t* q = a + g * 4;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i weight = _mm512_loadu_si512(p + c * 64);
      if (MR <= kPrefetchRows) _mm_prefetch(p + c * 64 + kPrefetch, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) dot(acc[m][c], weight, q + m * lda);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + m * 64 + c * 16, acc[m][c]);
}

}  // namespace
}  // namespace resq
