// 16 tokens of a page, and where the unpacked operands of many query rows have their dims.
#pragma once

#include "convert.h"

namespace resq {
namespace {

struct TilePlace {
  const uint8_t* page;
  int64_t token, valid;  // the first of 16 tokens within the page; how many were stored
};

RESQ_INLINE __m128i load_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Position of dim i of a group of 8 in the order that unpacking K's nibbles pairwise produces.
RESQ_INLINE int64_t key_position(int64_t dim) {
  constexpr int64_t place[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  return dim / 8 * 8 + place[dim % 8];
}

// Lanes of a tile from column 16t on that lie in [begin, end).
RESQ_INLINE __mmask16 columns_in(int64_t t, int64_t begin, int64_t end) {
  const auto below = [&](int64_t bound) {
    const int64_t n = bound - 16 * t;
    return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1;
  };
  return static_cast<__mmask16>(below(end) & ~below(begin));
}

// V's words hold a lane of 4 tokens: their bytes as tokens 0, 2, 1, 3, so that pairs of tokens become 16-bit halves.
RESQ_INLINE __m512i middle_bytes() {
  return _mm512_broadcast_i32x4(_mm_setr_epi32(0x03010200, 0x07050604, 0x0B090A08, 0x0F0D0E0C));
}

}  // namespace
}  // namespace resq
