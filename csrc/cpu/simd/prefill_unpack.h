// A block of packed keys and values -> bfloat16 operands, in the pairs that TDPBF16PS sums over.
//
// Low codes become code − zero point, an integer that bfloat16 holds exactly; K's low scale multiplies the scores, V's
// the probabilities. High codes are dequantized relative to the low part's scale, rounded to bfloat16. So a head is one
// operand of head_dim columns, whatever its parts.
#pragma once

#include "page_tile.h"

namespace resq {
namespace {

constexpr int64_t kBlockKeys = 128;

struct PrefillShape {
  int64_t dims;         // of a query row: padded low part, padded high part, zeros up to a multiple of 32
  int64_t tiles;        // of 16 dims of V: the same without the zeros
  int64_t width;        // floats of a sum
  int64_t key_bytes;    // of 16 keys
  int64_t value_bytes;  // of 16 dims; not a multiple of 4096, so that the tiles' rows do not share cache sets
};

PrefillShape prefill_shape(const PageLayout& p) {
  PrefillShape s{};
  const int64_t head = p.low_padded + p.high_padded;
  s.dims = round_up(head, 32);
  s.tiles = round_up(head, 16) / 16;
  s.width = 16 * s.tiles;
  s.key_bytes = s.dims / 2 * 64;
  s.value_bytes = kBlockKeys / 2 * 64 + 64;
  return s;
}

struct BlockScales {
  alignas(64) float key[kBlockKeys];    // of the low part; 0 where nothing was stored
  alignas(64) float value[kBlockKeys];
};

struct PrefillBlock {
  uint8_t *key, *value;
  BlockScales* scales;
};

// Float vectors -> one vector of bfloat16 pairs (first, second), rounded half to even; finite values only.
RESQ_INLINE __m512i bfloat_pairs(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

RESQ_INLINE __m256i small_integers(__m512i n) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(n)), 16));
}
// The integers −16 .. 15 in bfloat16, for vpermw, which takes the lowest five bits of an index: code + (16 − zero).
RESQ_INLINE __m512i difference_table() {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i negative = small_integers(_mm512_sub_epi32(lane, _mm512_set1_epi32(16)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(negative), small_integers(lane), 1);
}

// 16 − zero point of 16 tokens' low part.
RESQ_INLINE __m128i zero_complements(const uint8_t* zeros) {
  return _mm_sub_epi8(_mm_set1_epi8(16), load_bytes(zeros));
}

// What both parts of a key or value tile need of 16 tokens' high part.
struct HighPart {
  __m512 ratio, offset;  // of the scales; ratio · zero point
};

RESQ_INLINE HighPart high_part(__m512 ratio, const uint8_t* zeros) {
  return {ratio, _mm512_mul_ps(ratio, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(zeros))))};
}

void unpack_key_tile(const PageLayout& p, const TilePlace& at, __m512 ratio, uint8_t* to) {
  const __m512i table = difference_table(), nibble = _mm512_set1_epi16(15);
  const uint8_t *low = at.page + p.key_low + at.token * p.low_padded / 2, *zeros = at.page + p.zeros + at.token;
  const __m512i z = _mm512_cvtepu8_epi32(zero_complements(zeros)), up = _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
  const auto look_up = [&](__m512i code) { return _mm512_permutexvar_epi16(_mm512_add_epi16(code, up), table); };
  for (int64_t g = 0; g < p.low_padded / 8; ++g) {
    const __m512i codes = _mm512_loadu_si512(low + g * 64);
    uint8_t* rows = to + 256 * g;
    _mm512_storeu_si512(rows, look_up(_mm512_and_si512(codes, nibble)));
    _mm512_storeu_si512(rows + 64, look_up(_mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble)));
    _mm512_storeu_si512(rows + 128, look_up(_mm512_and_si512(_mm512_srli_epi16(codes, 8), nibble)));
    _mm512_storeu_si512(rows + 192, look_up(_mm512_srli_epi16(codes, 12)));
  }
  if (!p.high) return;
  const uint8_t* high = at.page + p.key_high + at.token * p.high_padded;
  const HighPart part = high_part(ratio, zeros + p.tokens);
  uint8_t* rows = to + p.low_padded * 32;
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t g = 0; g < p.high_padded / 4; ++g) {
    const __m512i codes = _mm512_loadu_si512(high + g * 64);
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      x[i] = _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), byte)), part.ratio,
                             part.offset);
    _mm512_storeu_si512(rows + 128 * g, bfloat_pairs(x[0], x[1]));
    _mm512_storeu_si512(rows + 128 * g + 64, bfloat_pairs(x[2], x[3]));
  }
}

// V of 16 tokens: rows of pairs of tokens, from row `row` of every tile of 16 dims.
void unpack_value_tile(const PageLayout& p, const PrefillShape& s, const TilePlace& at, __m512 ratio, int64_t row,
                       uint8_t* to) {
  const __m512i table = difference_table(), nibble = _mm512_set1_epi8(15);
  const __m512i middle = middle_bytes();
  const int64_t lanes = p.low_padded / 2;
  const uint8_t* zeros = at.page + p.zeros + p.parts * p.tokens + at.token;
  alignas(16) uint32_t complement[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(complement),
                  _mm_shuffle_epi8(zero_complements(zeros), _mm512_castsi512_si128(middle)));
  alignas(64) float ratios[16], offsets[16];
  if (p.high) {
    const HighPart part = high_part(ratio, zeros + p.tokens);
    _mm512_store_ps(ratios, part.ratio);
    _mm512_store_ps(offsets, part.offset);
  }
  for (int64_t t = 0; t < s.tiles; ++t) {
    const __mmask16 first = columns_in(t, 0, lanes), second = columns_in(t, lanes, 2 * lanes);
    const __mmask16 high = columns_in(t, 2 * lanes, 2 * lanes + p.high_padded);
    for (int64_t quad = 0; quad < 4; ++quad) {
      uint8_t* tile = to + t * s.value_bytes + (row + 2 * quad) * 64;
      __m512i pairs[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if (first | second) {
        const uint8_t* low = at.page + p.value_low + ((at.token / 4 + quad) * lanes + 16 * t) * 4;
        __m512i codes = _mm512_maskz_loadu_epi32(first, low);
        if (second)
          codes = _mm512_mask_srli_epi32(codes, second, _mm512_maskz_loadu_epi32(second, low - 4 * lanes), 4);
        codes = _mm512_and_si512(_mm512_shuffle_epi8(codes, middle), nibble);
        codes = _mm512_add_epi8(codes, _mm512_set1_epi32(static_cast<int>(complement[quad])));
        pairs[0] = _mm512_maskz_mov_epi32(first | second, _mm512_permutexvar_epi16(codes, table));
        pairs[1] = _mm512_maskz_mov_epi32(first | second,
                                          _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
      }
      if (high) {
        const uint8_t* bytes =
            at.page + p.value_high + ((at.token / 4 + quad) * p.high_padded + 16 * t - 2 * lanes) * 4;
        const __m512i codes = _mm512_maskz_loadu_epi32(high, bytes), byte = _mm512_set1_epi32(255);
        __m512 x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          x[i] = _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), byte)),
                                 _mm512_set1_ps(ratios[4 * quad + i]), _mm512_set1_ps(offsets[4 * quad + i]));
        pairs[0] = _mm512_mask_mov_epi32(pairs[0], high, bfloat_pairs(x[0], x[1]));
        pairs[1] = _mm512_mask_mov_epi32(pairs[1], high, bfloat_pairs(x[2], x[3]));
      }
      _mm512_storeu_si512(tile, pairs[0]);
      _mm512_storeu_si512(tile + 64, pairs[1]);
    }
  }
}

// Tile t of the block.
void unpack_block_tile(const PageLayout& p, const PrefillShape& s, const TilePlace& at, int64_t t,
                       const PrefillBlock& b) {
  const __mmask16 mask = static_cast<__mmask16>(at.valid >= 16 ? 0xFFFF : (1 << at.valid) - 1);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(at.page + p.scales) + at.token;
  const auto read = [&](int64_t row) {
    return (VF)_mm512_maskz_mov_ps(mask, (__m512)load_half(scales + row * p.tokens));
  };
  const VF key = read(0), value = read(p.parts);
  store(b.scales->key + 16 * t, key);
  store(b.scales->value + 16 * t, value);
  VF key_ratio = {}, value_ratio = {};
  if (p.high) {
    key_ratio = key > 0.0f ? read(1) / key : VF{};
    value_ratio = value > 0.0f ? read(p.parts + 1) / value : VF{};
  }
  unpack_key_tile(p, at, (__m512)key_ratio, b.key + t * s.key_bytes);
  unpack_value_tile(p, s, at, (__m512)value_ratio, 8 * t, b.value);
}

}  // namespace
}  // namespace resq
