// A block of packed keys and values -> int16 operands, in the pairs that vpdpwssd sums over.
//
// Codes become code − zero point, exactly. The low and the high part keep a scale each, so each is a product of its
// own: K's scales multiply the scores, V's the probabilities.
#pragma once

#include "page_tile.h"

namespace resq {
namespace {

constexpr int64_t kInt16Keys = 128;    // of a block
constexpr float kUnseenKey = -3e38f;  // a log2 that no key has
constexpr float kLargestWord = 32767.0f;

struct Int16Shape {
  int64_t low_pairs, high_pairs;   // of dims, in a query row and in K's tiles
  int64_t query_words;             // int16s of a query row, with zeros up to a multiple of 32
  int64_t low_tiles, high_tiles;   // of 16 dims of V
  int64_t width;                   // floats of a sum: the tiles of both parts
  int64_t key_bytes, value_bytes;  // of 16 keys; of 16 dims (not a multiple of 4096, because of the caches' sets)
};

Int16Shape int16_shape(const PageLayout& p) {
  Int16Shape s{};
  s.low_pairs = p.low_padded / 2;
  s.high_pairs = p.high_padded / 2;
  s.query_words = round_up(p.low_padded + p.high_padded, 32);
  s.low_tiles = round_up(p.low_padded, 16) / 16;
  s.high_tiles = round_up(p.high_padded, 16) / 16;
  s.width = 16 * (s.low_tiles + s.high_tiles);
  s.key_bytes = (s.low_pairs + s.high_pairs) * 64;
  s.value_bytes = kInt16Keys / 2 * 64 + 64;
  return s;
}

// Of a block's keys; 0 (in log2: kUnseenKey) where nothing was stored.
struct alignas(64) Int16Scales {
  float key_low[kInt16Keys], key_high[kInt16Keys];
  float value_log2[kInt16Keys], value_inverse[kInt16Keys];  // of V's low scale
  float value_ratio[kInt16Keys];                            // high over low scale, relative to the block's largest
  float largest_ratio;
};

struct Int16Block {
  uint8_t *key, *value;
  Int16Scales* scales;
};

// log2 of positive normal numbers, to float32's rounding: 2/ln 2 · artanh((m − 1)/(m + 1)), m in [0.75, 1.5).
RESQ_INLINE __m512 log2_positive(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 exponent = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 f = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(f, f);
  __m512 p = _mm512_set1_ps(2.88539008f / 9);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.88539008f / 7));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.88539008f / 5));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.88539008f / 3));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.88539008f));
  return _mm512_fmadd_ps(p, f, exponent);
}

// Position of dim i of the high part's groups of 4 in a query row, relative to the part.
RESQ_INLINE int64_t high_key_position(int64_t dim) {
  constexpr int64_t place[4] = {0, 2, 1, 3};
  return dim / 4 * 4 + place[dim % 4];
}

void unpack_key_words(const PageLayout& p, const TilePlace& at, uint8_t* to) {
  const uint8_t* zeros = at.page + p.zeros + at.token;
  const auto pairs_of = [&](const uint8_t* from) {
    const __m512i z = _mm512_cvtepu8_epi32(load_bytes(from));
    return _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
  };
  const __m512i low_zero = pairs_of(zeros), nibble = _mm512_set1_epi16(15);
  const uint8_t* low = at.page + p.key_low + at.token * p.low_padded / 2;
  const auto put = [](uint8_t* row, __m512i codes, __m512i zero) {
    _mm512_store_si512(row, _mm512_sub_epi16(codes, zero));
  };
  for (int64_t g = 0; g < p.low_padded / 8; ++g, to += 256) {
    const __m512i codes = _mm512_loadu_si512(low + g * 64);
    put(to, _mm512_and_si512(codes, nibble), low_zero);
    put(to + 64, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), low_zero);
    put(to + 128, _mm512_and_si512(_mm512_srli_epi16(codes, 8), nibble), low_zero);
    put(to + 192, _mm512_srli_epi16(codes, 12), low_zero);
  }
  if (!p.high) return;
  const __m512i high_zero = pairs_of(zeros + p.tokens), byte = _mm512_set1_epi16(255);
  const uint8_t* high = at.page + p.key_high + at.token * p.high_padded;
  for (int64_t g = 0; g < p.high_padded / 4; ++g, to += 128) {
    const __m512i codes = _mm512_loadu_si512(high + g * 64);
    put(to, _mm512_and_si512(codes, byte), high_zero);
    put(to + 64, _mm512_srli_epi16(codes, 8), high_zero);
  }
}

// Row in a tile of V of the first pair of token 16·t: vpackssdw takes 4 weights of each of two tiles of tokens in turn.
RESQ_INLINE int64_t value_row(int64_t t, int64_t quad) { return t / 2 * 16 + 4 * quad + t % 2 * 2; }

// Token tile t of the block, a row of pairs of tokens for every tile of 16 dims.
void unpack_value_words(const PageLayout& p, const Int16Shape& s, const TilePlace& at, int64_t t, uint8_t* to) {
  const __m512i middle = middle_bytes(), nibble = _mm512_set1_epi16(15), byte = _mm512_set1_epi16(255);
  const uint8_t* zeros = at.page + p.zeros + p.parts * p.tokens + at.token;
  const auto put = [&](int64_t tile, int64_t quad, __mmask16 mask, const uint8_t* zero, __m512i first, __m512i second) {
    uint8_t* row = to + tile * s.value_bytes + value_row(t, quad) * 64;
    const auto both = [&](int64_t i) { return _mm512_set1_epi32(zero[4 * quad + i] | zero[4 * quad + i + 1] << 16); };
    _mm512_store_si512(row, _mm512_maskz_mov_epi32(mask, _mm512_sub_epi16(first, both(0))));
    _mm512_store_si512(row + 64, _mm512_maskz_mov_epi32(mask, _mm512_sub_epi16(second, both(2))));
  };
  const int64_t lanes = p.low_padded / 2;
  for (int64_t tile = 0; tile < s.low_tiles; ++tile) {
    const __mmask16 first = columns_in(tile, 0, lanes), second = columns_in(tile, lanes, 2 * lanes);
    for (int64_t quad = 0; quad < 4; ++quad) {
      const uint8_t* low = at.page + p.value_low + ((at.token / 4 + quad) * lanes + 16 * tile) * 4;
      __m512i codes = _mm512_maskz_loadu_epi32(first, low);
      if (second) codes = _mm512_mask_srli_epi32(codes, second, _mm512_maskz_loadu_epi32(second, low - 4 * lanes), 4);
      codes = _mm512_shuffle_epi8(codes, middle);
      put(tile, quad, first | second, zeros, _mm512_and_si512(codes, nibble),
          _mm512_and_si512(_mm512_srli_epi16(codes, 8), nibble));
    }
  }
  for (int64_t tile = 0; tile < s.high_tiles; ++tile) {
    const __mmask16 mask = columns_in(tile, 0, p.high_padded);
    for (int64_t quad = 0; quad < 4; ++quad) {
      const uint8_t* high = at.page + p.value_high + ((at.token / 4 + quad) * p.high_padded + 16 * tile) * 4;
      const __m512i codes = _mm512_shuffle_epi8(_mm512_maskz_loadu_epi32(mask, high), middle);
      put(s.low_tiles + tile, quad, mask, zeros + p.tokens, _mm512_and_si512(codes, byte),
          _mm512_srli_epi16(codes, 8));
    }
  }
}

// Token tile t of the block.
void unpack_words(const PageLayout& p, const Int16Shape& s, const TilePlace& at, int64_t t, const Int16Block& b) {
  const __mmask16 mask = static_cast<__mmask16>(at.valid >= 16 ? 0xFFFF : (1 << max(at.valid, int64_t{0})) - 1);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(at.page + p.scales) + at.token;
  const auto read = [&](int64_t row) {
    return _mm512_maskz_mov_ps(mask, (__m512)load_half(scales + row * p.tokens));
  };
  const __m512 value = read(p.parts), nothing = _mm512_setzero_ps();
  const __mmask16 stored = _mm512_cmp_ps_mask(value, nothing, _CMP_GT_OQ);
  Int16Scales& to = *b.scales;
  _mm512_store_ps(to.key_low + 16 * t, read(0));
  _mm512_store_ps(to.key_high + 16 * t, p.high ? read(1) : nothing);
  _mm512_store_ps(to.value_log2 + 16 * t,
                  _mm512_mask_mov_ps(_mm512_set1_ps(kUnseenKey), stored, log2_positive(value)));
  _mm512_store_ps(to.value_inverse + 16 * t, _mm512_maskz_div_ps(stored, _mm512_set1_ps(1.0f), value));
  _mm512_store_ps(to.value_ratio + 16 * t,
                  p.high ? _mm512_maskz_div_ps(stored, read(p.parts + 1), value) : nothing);
  unpack_key_words(p, at, b.key + t * s.key_bytes);
  unpack_value_words(p, s, at, t, b.value);
}

// After all `tiles` of a block.
void relate_ratios(int64_t tiles, Int16Scales& s) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t t = 0; t < tiles; ++t) largest = _mm512_max_ps(largest, _mm512_load_ps(s.value_ratio + 16 * t));
  s.largest_ratio = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(s.largest_ratio > 0.0f ? 1.0f / s.largest_ratio : 0.0f);
  for (int64_t t = 0; t < tiles; ++t)
    _mm512_store_ps(s.value_ratio + 16 * t, _mm512_mul_ps(_mm512_load_ps(s.value_ratio + 16 * t), inverse));
}

}  // namespace
}  // namespace resq
