// Integer micro-kernels for AVX-512 VNNI: up to 6 tokens x 64 output columns, unpacked in registers.
#pragma once

#include "run_terms.h"

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

// Bytes between a weight's prefetch and its use. More rows hide the wait.
constexpr int64_t kPrefetch = 2048;
constexpr int kPrefetchRows = 4;

// Superblocks that MR rows read side by side. An Intel core's own prefetching follows a stream no further than its 4 KiB
// page and keeps only so many lines of it under way: it reads 17.0 GB/s from four streams, 15.6 from two and 13.6 from
// one (M = 1, 16384 x 2048, 2 MiB pages; two cores 33.5, 31.5 and 27). On a Zen 4 one stream without prefetches takes
// 0.7 to 0.9 of the time of four with them (M = 1, a 1B model's layers: benchmarks/decoder.py; isa.cpp chooses).
template <Reading R, int MR>
constexpr int kAbreast = R == Reading::in_order ? 1 : MR == 1 ? 4 : MR <= 3 ? 2 : 1;
template <Reading R, int MR>
constexpr bool kAsks = R == Reading::side_by_side && MR <= kPrefetchRows;

RESQ_INLINE void in_order() { asm volatile("" ::: "memory"); }

// A vector of weights. A line is asked for after each one that is read, in this order: the compiler would gather the
// prefetches of a group in front, where reads queue up behind them (16.8 instead of 18.4 GB/s in the loop alone).
template <bool kAsk>
RESQ_INLINE __m512i read_weights(const uint8_t* p) {
  const __m512i weights = _mm512_loadu_si512(p);
  if (kAsk) {
    in_order();
    _mm_prefetch(p + kPrefetch, _MM_HINT_T0);
    in_order();
  }
  return weights;
}

// The next superblock's bytes, some at every step while this one is multiplied: into L2, as both are more than L1.
struct Ahead {
  const uint8_t* at;
  int64_t rate;  // bytes a step, at most a line

  RESQ_INLINE void step() {
    _mm_prefetch(at, _MM_HINT_T1);
    at += rate;
  }
};
constexpr int64_t kAheadSteps = 2;  // of a group

// y[m·64·S + 64·s + n] (+)= the terms of these products. In registers: through memory, and row by row, terms took twice
// as long.
template <bool kFirst, int MR, int S>
RESQ_INLINE void add_terms(const RunTerms<MR>& terms, const __m512i (&acc)[MR][S][4]) {
#pragma GCC unroll 16
  for (int c = 0; c < 4 * S; ++c) {
    const __mmask16 used = first_lanes(terms.n - c * W);
    const VU sum = (VU)_mm512_maskz_loadu_epi32(used, terms.weight_sum + c * W);
    const VF weight = (VF)_mm512_maskz_loadu_ps(used, terms.weight_scale + c * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      float* y = terms.y + (m * 4 * S + c) * W;
      const VF term = terms.of((VU)acc[m][c / 4][c % 4], sum, weight, m);
      store(y, kFirst ? term : load(y) + term);
    }
  }
}

// The terms of Σ over groups of 8 columns, weights as nibbles: 4 vectors of 16 outputs per group, byte 4c + j
// of a vector holding column j of the group (low nibble) and column 4 + j (high nibble) for output c. S superblocks that
// lie `stride` bytes apart.
template <int MR, int S, bool kAsk>
__attribute__((noinline)) void micro_nibbles(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups,
                                             const RunTerms<MR>& terms, int64_t stride, Ahead& next) {
  __m512i acc[MR][S][4];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < 4 * S; ++c) acc[m][c / 4][c % 4] = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(15);
  Ahead ahead = next;
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* q = a + g * 8;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint8_t* p = w + s * stride + g * 256;
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        if (MR > kPrefetchRows && c % (4 / kAheadSteps) == 0) ahead.step();
        const __m512i both = read_weights<kAsk>(p + c * 64);
        const __m512i low = _mm512_and_si512(both, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) dot(acc[m][s][c], low, q + m * lda);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) dot(acc[m][s][c], high, q + m * lda + 4);
      }
    }
  }
  next = ahead;
  if (terms.first) {
    add_terms<true>(terms, acc);
  } else {
    add_terms<false>(terms, acc);
  }
}

// The same with a byte per weight and groups of 4 columns.
template <int MR, int S, bool kAsk>
__attribute__((noinline)) void micro_bytes(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups,
                                           const RunTerms<MR>& terms, int64_t stride, Ahead& next) {
  __m512i acc[MR][S][4];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < 4 * S; ++c) acc[m][c / 4][c % 4] = _mm512_setzero_si512();
  Ahead ahead = next;
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* q = a + g * 4;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint8_t* p = w + s * stride + g * 256;
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        if (MR > kPrefetchRows && c % (4 / kAheadSteps) == 0) ahead.step();
        const __m512i weight = read_weights<kAsk>(p + c * 64);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) dot(acc[m][s][c], weight, q + m * lda);
      }
    }
  }
  next = ahead;
  if (terms.first) {
    add_terms<true>(terms, acc);
  } else {
    add_terms<false>(terms, acc);
  }
}

}  // namespace
}  // namespace resq
