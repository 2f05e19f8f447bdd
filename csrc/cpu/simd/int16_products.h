// Products of int16 pairs with vpdpwssd: rows by tiles of 16 columns, int32 sums in registers.
//
// On Sapphire Rapids vpdpwssd starts twice a clock, 64 multiply-adds; vdpbf16ps every second clock, 16; a float32 FMA
// makes 32.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr int kDotRows = 6;      // with 4 tiles: 24 sums, 4 vectors of B and a broadcast of A fill 29 registers
constexpr int kSingleRows = 12;  // with one tile: enough sums in flight to hide the latency

// Inline assembly for the reason given at `dot` in micro_avx512.h.
RESQ_INLINE void dot_words(__m512i& acc, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// acc = A [R, 2·pairs] · B; A's rows lie a_words apart, B's tiles b_bytes.
template <int R, int V>
RESQ_INLINE void dot_pairs(__m512i (&acc)[R][V], const int16_t* a, int64_t a_words, const uint8_t* b, int64_t b_bytes,
                           int64_t pairs) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = _mm512_load_si512(b + v * b_bytes + 64 * i);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i left = _mm512_set1_epi32(*reinterpret_cast<const IntMem*>(a + r * a_words + 2 * i));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) dot_words(acc[r][v], left, column[v]);
    }
  }
}

// Inlined into its callers, g++ 12 keeps its sums in memory: half the speed.
template <int R, int V, class F>
__attribute__((noinline)) void product_rows(const int16_t* a, int64_t a_words, const uint8_t* b, int64_t b_bytes,
                                            int64_t pairs, int64_t row, int64_t tile, const F& out) {
  __m512i acc[R][V];
  dot_pairs<R, V>(acc, a + row * a_words, a_words, b + tile * b_bytes, b_bytes, pairs);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) out(row + r, tile + v, acc[r][v]);
}

// out(row, tile, sums) for `rows` rows, a multiple of kSingleRows, and `tiles` tiles.
template <class F>
RESQ_INLINE void product(int64_t rows, const int16_t* a, int64_t a_words, const uint8_t* b, int64_t b_bytes,
                         int64_t tiles, int64_t pairs, const F& out) {
  for (int64_t tile = 0; tile < tiles;) {
    const int64_t left = tiles - tile, blocks = (left + 3) / 4, width = (left + blocks - 1) / blocks;  // 5 = 3 + 2
    const int64_t step = width == 1 ? kSingleRows : kDotRows;
    for (int64_t row = 0; row < rows; row += step) {
      switch (width) {
        case 1: product_rows<kSingleRows, 1>(a, a_words, b, b_bytes, pairs, row, tile, out); break;
        case 2: product_rows<kDotRows, 2>(a, a_words, b, b_bytes, pairs, row, tile, out); break;
        case 3: product_rows<kDotRows, 3>(a, a_words, b, b_bytes, pairs, row, tile, out); break;
        default: product_rows<kDotRows, 4>(a, a_words, b, b_bytes, pairs, row, tile, out); break;
      }
    }
    tile += width;
  }
}

}  // namespace
}  // namespace resq
