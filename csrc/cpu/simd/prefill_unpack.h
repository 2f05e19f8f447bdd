// A block of packed keys and values -> bfloat16 operands, in the pairs that vdpbf16ps and TDPBF16PS sum over.
//
// Codes become integers in bfloat16, exactly: K's scales multiply the scores and V's low scale the probabilities. Zero
// points are summed along: K's as extra dims that meet −Σq, V's as an extra column of the output. Only V's high part is
// dequantized (relative to the low part's scale), as it has a scale and a zero point of its own.
#pragma once

#include "convert.h"

namespace resq {
namespace {

constexpr int64_t kBlockKeys = 128;
constexpr int64_t kZeroDims = 3;  // −Σq as three bfloat16 that add up to 24 bits

struct PrefillShape {
  int64_t low_dims, high_dims;    // of a query row's parts, with zero dims, padded to 32
  int64_t dims;                   // of a query row
  int64_t low_tiles, high_tiles;  // of 16 dims: V's nibbles (one of them has a lane to spare), V's high part
  int64_t tiles, width;           // of V; floats of a sum
  int64_t key_bytes;              // of 16 keys
  int64_t value_bytes;            // of 16 dims; not a multiple of 4096, so that the tiles' rows do not share cache sets
};

PrefillShape prefill_shape(const PageLayout& p) {
  PrefillShape s{};
  s.low_dims = round_up(p.low_padded + kZeroDims, 32);
  s.high_dims = p.high ? round_up(p.high_padded + kZeroDims, 32) : 0;
  s.dims = s.low_dims + s.high_dims;
  s.low_tiles = p.low_padded / 2 / 16 + 1;
  s.high_tiles = (p.high_padded + 15) / 16;
  s.tiles = 2 * s.low_tiles + s.high_tiles;
  s.width = 16 * s.tiles;
  s.key_bytes = s.dims / 2 * 64;
  s.value_bytes = kBlockKeys / 2 * 64 + 64;
  return s;
}

struct BlockScales {
  alignas(64) float key[2][kBlockKeys];  // by part; 0 where nothing was stored
  alignas(64) float value[kBlockKeys];   // of the low part
};

struct PrefillBlock {
  uint8_t *key, *value;
  BlockScales* scales;
};

// Two int vectors below 2^8 -> one vector of bfloat16 pairs (first, second), exactly.
RESQ_INLINE __m512i pair_of_codes(__m512i first, __m512i second) {
  const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(first)), b = _mm512_castps_si512(_mm512_cvtepi32_ps(second));
  return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
}

// The upper half of float32, rounded half to even; finite values only.
RESQ_INLINE __m512i bfloat_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
}

// The integers 0 .. 15 in bfloat16, twice: an index's fifth bit belongs to another nibble.
RESQ_INLINE __m512i nibble_table() {
  const __m512i n = _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                     _mm512_set1_epi32(15));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(n)), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

struct TilePlace {
  const uint8_t* page;
  int64_t token, valid;  // the first of 16 tokens within the page; how many were stored
};

RESQ_INLINE __m512i load_words_of_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Pairs of zero points as K's dims `width`, width + 1, width + 2.
RESQ_INLINE void put_key_zeros(const uint8_t* zeros, int64_t width, uint8_t* rows) {
  const __m512i z = load_words_of_bytes(zeros);
  _mm512_storeu_si512(rows + width / 2 * 64, pair_of_codes(z, z));
  _mm512_storeu_si512(rows + (width / 2 + 1) * 64, pair_of_codes(z, _mm512_setzero_si512()));
}

void unpack_key_tile(const PageLayout& p, const PrefillShape& s, const TilePlace& at, uint8_t* to) {
  const __m512i table = nibble_table();
  const uint8_t* low = at.page + p.key_low + at.token * p.low_padded / 2;
  for (int64_t g = 0; g < p.low_padded / 8; ++g) {
    const __m512i codes = _mm512_loadu_si512(low + g * 64);
    uint8_t* rows = to + 256 * g;
    _mm512_storeu_si512(rows, _mm512_permutexvar_epi16(codes, table));
    _mm512_storeu_si512(rows + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
    _mm512_storeu_si512(rows + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
    _mm512_storeu_si512(rows + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
  }
  put_key_zeros(at.page + p.zeros + at.token, p.low_padded, to);
  if (!p.high) return;
  const uint8_t* high = at.page + p.key_high + at.token * p.high_padded;
  uint8_t* rows = to + s.low_dims / 2 * 64;
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t g = 0; g < p.high_padded / 4; ++g) {
    const __m512i codes = _mm512_loadu_si512(high + g * 64);
    const __m512i c1 = _mm512_and_si512(_mm512_srli_epi32(codes, 8), byte);
    const __m512i c2 = _mm512_and_si512(_mm512_srli_epi32(codes, 16), byte);
    _mm512_storeu_si512(rows + 128 * g, pair_of_codes(_mm512_and_si512(codes, byte), c1));
    _mm512_storeu_si512(rows + 128 * g + 64, pair_of_codes(c2, _mm512_srli_epi32(codes, 24)));
  }
  put_key_zeros(at.page + p.zeros + p.tokens + at.token, p.high_padded, rows);
}

// Position of dim i of a group of 8 in the order that unpack_key_tile produces.
RESQ_INLINE int64_t key_position(int64_t dim) {
  constexpr int64_t place[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  return dim / 8 * 8 + place[dim % 8];
}

// V of 16 tokens: rows of pairs of tokens, from row `row` of every tile of 16 dims.
void unpack_value_tile(const PageLayout& p, const PrefillShape& s, const TilePlace& at, const float* ratio,
                       int64_t row, uint8_t* to) {
  const __m512i table = nibble_table();
  const __m512i middle = _mm512_set1_epi32(0x03010200);  // bytes of a word: tokens 0, 2, 1, 3
  const __m512i shuffle = _mm512_add_epi32(middle, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808,
                                                                                         0x0C0C0C0C)));
  const int64_t lanes = p.low_padded / 2, spare = lanes / 16;
  const __mmask16 zero_lane = static_cast<__mmask16>(1 << lanes % 16);
  const uint8_t* zeros = at.page + p.zeros + p.parts * p.tokens + at.token;
  alignas(64) uint32_t zero_pair[16];
  const __m512i z = load_words_of_bytes(zeros);
  _mm512_store_si512(zero_pair, pair_of_codes(z, _mm512_shuffle_epi32(z, _MM_PERM_CDAB)));  // even words are used
  for (int64_t quad = 0; quad < 4; ++quad) {
    const uint8_t* low = at.page + p.value_low + (at.token / 4 + quad) * lanes * 4;
    uint8_t* rows = to + (row + 2 * quad) * 64;
    const int64_t high_nibbles = s.low_tiles * s.value_bytes;
    for (int64_t v = 0; v < s.low_tiles; ++v) {
      uint8_t* tile = rows + v * s.value_bytes;
      __m512i codes = _mm512_setzero_si512();
      if (16 * v < lanes) codes = _mm512_shuffle_epi8(_mm512_loadu_si512(low + 64 * v), shuffle);
      __m512i first = _mm512_permutexvar_epi16(codes, table);
      __m512i second = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
      if (v == spare) {
        first = _mm512_mask_set1_epi32(first, zero_lane, static_cast<int>(zero_pair[4 * quad]));
        second = _mm512_mask_set1_epi32(second, zero_lane, static_cast<int>(zero_pair[4 * quad + 2]));
      }
      _mm512_storeu_si512(tile, first);
      _mm512_storeu_si512(tile + 64, second);
      _mm512_storeu_si512(tile + high_nibbles, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
      _mm512_storeu_si512(tile + high_nibbles + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
    }
    const uint8_t* high = at.page + p.value_high + (at.token / 4 + quad) * p.high_padded * 4;
    const uint8_t* high_zero = zeros + p.tokens;
    for (int64_t v = 0; v < s.high_tiles; ++v) {
      const __m512i codes = _mm512_loadu_si512(high + 64 * v), byte = _mm512_set1_epi32(255);
      __m512i bits[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), byte);
        const __m512i moved = _mm512_sub_epi32(code, _mm512_set1_epi32(high_zero[4 * quad + i]));
        bits[i] = bfloat_bits(_mm512_mul_ps(_mm512_cvtepi32_ps(moved), _mm512_set1_ps(ratio[4 * quad + i])));
      }
      uint8_t* tile = rows + (2 * s.low_tiles + v) * s.value_bytes;
      _mm512_storeu_si512(tile, _mm512_or_si512(bits[0], _mm512_slli_epi32(bits[1], 16)));
      _mm512_storeu_si512(tile + 64, _mm512_or_si512(bits[2], _mm512_slli_epi32(bits[3], 16)));
    }
  }
}

// Tile t of the block.
void unpack_block_tile(const PageLayout& p, const PrefillShape& s, const TilePlace& at, int64_t t,
                       const PrefillBlock& b) {
  const __mmask16 mask = static_cast<__mmask16>(at.valid >= 16 ? 0xFFFF : (1 << at.valid) - 1);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(at.page + p.scales) + at.token;
  const auto read = [&](int64_t row) { return (VF)load_half(scales + row * p.tokens); };
  const auto stored = [&](VF v) { return (VF)_mm512_maskz_mov_ps(mask, (__m512)v); };
  for (int64_t part = 0; part < p.parts; ++part) store(b.scales->key[part] + 16 * t, stored(read(part)));
  const VF low = stored(read(p.parts));
  store(b.scales->value + 16 * t, low);
  alignas(64) float ratio[16] = {};
  if (p.high) {
    const VF high = stored(read(p.parts + 1));
    store(ratio, low > 0.0f ? high / low : VF{});
  }
  unpack_key_tile(p, s, at, b.key + t * s.key_bytes);
  unpack_value_tile(p, s, at, ratio, 8 * t, b.value);
}

}  // namespace
}  // namespace resq
