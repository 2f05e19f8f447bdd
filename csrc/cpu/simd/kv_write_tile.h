// kv_write for the 16 tokens of a whole tile of a page and one head, with tokens as vector lanes.
//
// Extrema, scales and codes then need no reduction across lanes, and a tile of K is written in whole vectors: with
// head_dim 128 a head of a token takes 270 clocks, rotation included, where one by one it takes 700. Everything rounds
// as in kv_write.h, bit for bit; only a rotation by tiles sums in another order.
#pragma once

#include "tiles.h"
#include "token_lanes.h"

namespace resq {
namespace {

constexpr float kFloat16Max = 65504.0f;
constexpr int64_t kRotationTerms = 3;  // bfloat16 terms of U_C: 24 bits, all that float32 holds

// NJ dims of x · U_C for 16 tokens of NU units, which lie `unit` floats apart, in the order of gemm_f32's sums.
template <int NU, int NJ>
RESQ_INLINE void rotate_dims(const float* x, int64_t unit, int64_t dim, const float* rotation, float* to) {
  __m512 acc[NU][NJ];
#pragma GCC unroll 4
  for (int u = 0; u < NU; ++u)
#pragma GCC unroll 24
    for (int j = 0; j < NJ; ++j) acc[u][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < dim; ++k) {
    __m512 row[NU];
#pragma GCC unroll 4
    for (int u = 0; u < NU; ++u) row[u] = _mm512_load_ps(x + u * unit + 16 * k);
#pragma GCC unroll 24
    for (int j = 0; j < NJ; ++j) {
      const __m512 factor = _mm512_set1_ps(rotation[k * dim + j]);
#pragma GCC unroll 4
      for (int u = 0; u < NU; ++u) acc[u][j] = _mm512_fmadd_ps(factor, row[u], acc[u][j]);
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < NU; ++u)
#pragma GCC unroll 24
    for (int j = 0; j < NJ; ++j) _mm512_store_ps(to + u * unit + 16 * j, acc[u][j]);
}

template <int NU, int NJ>
void rotate_lanes(const float* x, int64_t unit, int64_t dim, const float* rotation, float* to) {
  int64_t j = 0;
  for (; j + NJ <= dim; j += NJ) rotate_dims<NU, NJ>(x, unit, dim, rotation + j, to + 16 * j);
  for (; j + 2 <= dim; j += 2) rotate_dims<NU, 2>(x, unit, dim, rotation + j, to + 16 * j);
  for (; j < dim; ++j) rotate_dims<NU, 1>(x, unit, dim, rotation + j, to + 16 * j);
}

constexpr int64_t kShared = 3;  // units that share an element of U_C, with 8 dims each

// U_Cᵀ in bfloat16 terms, as the tiles that rotate_tiles multiplies: [16 dims of the result, term, 32 dims], each of
// 16 rows of 64 bytes.
int64_t split_depth(const PageLayout& p) { return round_up(p.head_dim, 32); }
int64_t split_bytes(const KVWriteArgs& args) {
  return kRotationTerms * round_up(args.page.head_dim, 16) * split_depth(args.page) * 2;
}

void split_transposed(const KVWriteArgs& args, uint8_t* out) {
  const int64_t dim = args.page.head_dim, depth = split_depth(args.page);
  for (int64_t j = 0; j < round_up(dim, 16); j += 16) {
    const int64_t columns = dim - j;
    const __mmask16 mask = static_cast<__mmask16>(columns >= 16 ? 0xFFFF : (1 << columns) - 1);
    for (int64_t k = 0; k < depth; k += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_maskz_loadu_epi32(k + i < dim ? mask : 0, args.rotation + (k + i) * dim + j);
      transpose_words(r);
      for (int64_t i = 0; i < 16; ++i) {
        VF rest = (VF)r[i];
        for (int64_t term = 0; term < kRotationTerms; ++term) {
          const int64_t tile = (j / 16 * kRotationTerms + term) * (depth / 32) + k / 32;
          uint16_t* to = reinterpret_cast<uint16_t*>(out) + tile * 512 + i * 32 + k % 32;
          store_bfloat(to, rest);
          rest -= load_bfloat(to);
        }
      }
    }
  }
}

constexpr int64_t kTogether = 4;  // heads or tiles of tokens that meet a tile of U_C while it is in a register

// to[unit][16 · dim + token] = x · U_C for up to kTogether units, one after the other as TileBuffers has them.
template <int kUnits>
void rotate_tiles(const uint32_t* pairs, const PageLayout& p, const uint8_t* split, float* to) {
  const int64_t depth = split_depth(p), unit_pairs = depth / 2 * 16, unit_floats = depth * 16;
  for (int64_t j = 0; j < p.head_dim; j += 16) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t term = 0; term < kRotationTerms; ++term) {
      const uint32_t* b = pairs;
      for (int64_t k = 0; k < depth; k += 32, split += 1024, b += 256) {
        tile_load<4>(split, 64);
        tile_load<5>(b, 64), tile_bfloats<0, 4, 5>();
        if constexpr (kUnits > 1) tile_load<6>(b + unit_pairs, 64), tile_bfloats<1, 4, 6>();
        if constexpr (kUnits > 2) tile_load<7>(b + 2 * unit_pairs, 64), tile_bfloats<2, 4, 7>();
        if constexpr (kUnits > 3) tile_load<5>(b + 3 * unit_pairs, 64), tile_bfloats<3, 4, 5>();
      }
    }
    tile_store<0>(to + 16 * j, 64);
    if constexpr (kUnits > 1) tile_store<1>(to + unit_floats + 16 * j, 64);
    if constexpr (kUnits > 2) tile_store<2>(to + 2 * unit_floats + 16 * j, 64);
    if constexpr (kUnits > 3) tile_store<3>(to + 3 * unit_floats + 16 * j, 64);
  }
}

// Scales and zero points of one part of 16 tokens, and its codes [n, 16].
struct LaneCodes {
  __m256i scale;  // float16
  __m512i zero;
  int32_t* codes;
};

// x [n, 16] -> codes [n, 16]: quantize_part of kv_write.h on every lane.
LaneCodes quantize_lanes(const float* x, int64_t n, int32_t bits, int32_t* codes) {
  __m512 low = _mm512_setzero_ps(), high = low, low2 = low, high2 = low;
  for (int64_t i = 0; i + 1 < n; i += 2) {
    const __m512 v = _mm512_load_ps(x + 16 * i), v2 = _mm512_load_ps(x + 16 * i + 16);
    low = _mm512_min_ps(low, v), low2 = _mm512_min_ps(low2, v2);
    high = _mm512_max_ps(high, v), high2 = _mm512_max_ps(high2, v2);
  }
  const __m512 last = _mm512_load_ps(x + 16 * (n - 1));
  low = _mm512_min_ps(_mm512_min_ps(low, low2), last);
  high = _mm512_max_ps(_mm512_max_ps(high, high2), last);
  const int32_t levels = (1 << bits) - 1;
  const __m512 wanted = _mm512_div_ps(_mm512_sub_ps(high, low), _mm512_set1_ps(static_cast<float>(levels)));
  const __m512 widest = _mm512_set1_ps(kFloat16Max), limit = _mm512_set1_ps(4096.0f), nothing = _mm512_setzero_ps();
  __m512 step = _mm512_cvtph_ps(_mm512_cvtps_ph(_mm512_min_ps(wanted, widest), _MM_FROUND_TO_NEAREST_INT));
  step = _mm512_mask_mov_ps(step, _mm512_cmp_ps_mask(step, nothing, _CMP_EQ_OQ), _mm512_set1_ps(1.0f));
  const __m512 below = _mm512_div_ps(_mm512_sub_ps(nothing, low), step);
  const __m512i top = _mm512_set1_epi32(levels), bottom = _mm512_setzero_si512();
  LaneCodes q;
  q.codes = codes;
  q.scale = _mm512_cvtps_ph(step, _MM_FROUND_TO_NEAREST_INT);
  q.zero = _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(below, limit), nothing)), top);
  // A product with 1/step differs from the quotient by less than 3 · 2^-24 of it, and is taken unless it lies so close
  // to a tie between two codes that the quotient could round to the other one. Beyond a scale of 65504 it may exceed
  // what adding kRoundMagic can round: then there are only quotients.
  const bool cut = _mm512_cmp_ps_mask(wanted, widest, _CMP_NLE_UQ);
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), step), magic = _mm512_set1_ps(kRoundMagic);
  const __m512 margin = _mm512_set1_ps(cut ? -1.0f : 0.5f - static_cast<float>(levels + 1) * 0x1p-22f);
  const __m512i magic_bits = _mm512_set1_epi32(kRoundMagicBits);
  for (int64_t i = 0; i < n; ++i) {
    const __m512 v = _mm512_load_ps(x + 16 * i), product = _mm512_mul_ps(v, inverse);
    const __m512 rounded = _mm512_add_ps(product, magic);
    const __m512 error = _mm512_abs_ps(_mm512_sub_ps(product, _mm512_sub_ps(rounded, magic)));
    __m512i near = _mm512_sub_epi32(_mm512_castps_si512(rounded), magic_bits);
    if (__builtin_expect(_mm512_cmp_ps_mask(error, margin, _CMP_NLE_UQ) != 0, 0)) {
      const __m512 ratio = _mm512_min_ps(_mm512_div_ps(v, step), limit);
      near = _mm512_cvtps_epi32(_mm512_max_ps(ratio, _mm512_sub_ps(nothing, limit)));
    }
    const __m512i code = _mm512_max_epi32(_mm512_add_epi32(near, q.zero), bottom);
    _mm512_store_si512(codes + 16 * i, _mm512_min_epi32(code, top));
  }
  return q;
}

RESQ_INLINE __m512i load_codes(const int32_t* codes, int64_t i) { return _mm512_load_si512(codes + 16 * i); }
RESQ_INLINE __m512i nibbles(const int32_t* codes, int64_t first, int64_t second) {
  return _mm512_or_si512(load_codes(codes, first), _mm512_slli_epi32(load_codes(codes, second), 4));
}
// Four vectors of bytes in 32-bit lanes -> one.
RESQ_INLINE __m512i join_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_or_si512(a, _mm512_slli_epi32(b, 8)), cd = _mm512_or_si512(c, _mm512_slli_epi32(d, 8));
  return _mm512_or_si512(ab, _mm512_slli_epi32(cd, 16));
}

// K's tile: 16 tokens side by side.
void put_key_codes(uint8_t* tile, const int32_t* codes, int64_t width, bool four_bits) {
  if (four_bits) {
    for (int64_t i = 0; i < width; i += 8)
      _mm512_storeu_si512(tile + i * 8, join_bytes(nibbles(codes, i, i + 4), nibbles(codes, i + 1, i + 5),
                                                   nibbles(codes, i + 2, i + 6), nibbles(codes, i + 3, i + 7)));
  } else {
    for (int64_t i = 0; i < width; i += 4)
      _mm512_storeu_si512(tile + i * 16, join_bytes(load_codes(codes, i), load_codes(codes, i + 1),
                                                    load_codes(codes, i + 2), load_codes(codes, i + 3)));
  }
}

// V's quads: 4 tokens side by side, for every lane.
void put_value_codes(uint8_t* quads, const int32_t* codes, int64_t width, bool four_bits) {
  const int64_t lanes = four_bits ? width / 2 : width;
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t c = 0; c < lanes; c += 4) {
    const __m512i joined =
        four_bits ? join_bytes(nibbles(codes, c, c + lanes), nibbles(codes, c + 1, c + 1 + lanes),
                               nibbles(codes, c + 2, c + 2 + lanes), nibbles(codes, c + 3, c + 3 + lanes))
                  : join_bytes(load_codes(codes, c), load_codes(codes, c + 1), load_codes(codes, c + 2),
                               load_codes(codes, c + 3));
    const __m512i words = _mm512_shuffle_epi8(joined, turn);
    const auto quad = [&](int64_t i) { return reinterpret_cast<__m128i*>(quads + (i * lanes + c) * 4); };
    _mm_storeu_si128(quad(0), _mm512_castsi512_si128(words));
    _mm_storeu_si128(quad(1), _mm512_extracti32x4_epi32(words, 1));
    _mm_storeu_si128(quad(2), _mm512_extracti32x4_epi32(words, 2));
    _mm_storeu_si128(quad(3), _mm512_extracti32x4_epi32(words, 3));
  }
}

// One head of K (which = 0) or V (1) of the 16 tokens from `token` of the page on. codes: scratch.
void write_lanes(const PageLayout& p, uint8_t* page, int64_t token, int which, const float* x, int32_t* codes) {
  const auto part = [&](int64_t number, const float* from, int64_t dims, int64_t padded, int32_t bits) {
    const LaneCodes q = quantize_lanes(from, dims, bits, codes);
    for (int64_t i = dims; i < padded; ++i) _mm512_store_si512(codes + 16 * i, _mm512_setzero_si512());
    const int64_t row = (which * p.parts + number) * p.tokens + token;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(page + p.scales + row * 2), q.scale);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(page + p.zeros + row), _mm512_cvtepi32_epi8(q.zero));
    const int64_t plane = which ? (number ? p.value_high : p.value_low) : (number ? p.key_high : p.key_low);
    (which ? put_value_codes : put_key_codes)(page + plane + token * padded * bits / 8, codes, padded, bits == 4);
  };
  part(0, x, p.low, p.low_padded, static_cast<int32_t>(p.low_bits));
  if (p.high) part(1, x + 16 * p.low, p.high, p.high_padded, 8);
}

// A call's tiles x heads, heads fastest.
struct TileUnits {
  const KVWriteArgs& args;
  const int64_t* tiles;  // the first token's number in the call

  int64_t head(int64_t unit) const { return unit % args.heads; }
  int64_t first(int64_t unit) const { return tiles[unit / args.heads]; }
  HeadRows key(int64_t unit) const { return rows(args.key, unit, args.key_token_stride, args.key_head_stride); }
  HeadRows value(int64_t unit) const {
    return rows(args.value, unit, args.value_token_stride, args.value_head_stride);
  }
  void write(int64_t unit, int which, const float* x, int32_t* codes) const {
    const int64_t slot = args.slots[first(unit)], tokens = args.page.tokens;
    uint8_t* page = args.cache + slot / tokens * args.block_stride + head(unit) * args.head_stride;
    write_lanes(args.page, page, slot % tokens, which, x, codes);
  }

 private:
  HeadRows rows(const void* x, int64_t unit, int64_t token_stride, int64_t head_stride) const {
    return {element(x, args.dtype, first(unit) * token_stride + head(unit) * head_stride), args.dtype, token_stride,
            args.page.head_dim};
  }
};

// Buffers for `units` heads at a time: pairs [units, dims / 2, 16], then rotated [units, dims, 16], plain [plain units,
// dims, 16] and codes [dims, 16].
struct TileBuffers {
  TileBuffers(const PageLayout& p, int64_t units, int64_t plain_units) : dims(round_up(p.head_dim, 32)) {
    pairs = static_cast<uint32_t*>(thread_scratch(Slot::kv_rows, dims * 32 * (3 * units + 2 * plain_units + 2)));
    rotated = reinterpret_cast<float*>(pairs + units * dims * 8);
    plain = rotated + units * dims * 16;
    codes = reinterpret_cast<int32_t*>(plain + plain_units * dims * 16);
  }
  int64_t dims;
  uint32_t* pairs;
  float *rotated, *plain;
  int32_t* codes;
};

void write_tiles_float(const KVWriteArgs& args, const int64_t* tiles, int64_t begin, int64_t end) {
  const TileUnits units{args, tiles};
  const TileBuffers b(args.page, kShared, kShared);
  const int64_t unit = b.dims * 16, dim = args.page.head_dim;
  for (int64_t i = begin; i < end; i += kShared) {
    const int64_t count = min(end - i, kShared);
    for (int64_t u = 0; u < count; ++u) load_lanes(units.key(i + u), b.pairs, b.plain + u * unit);
    const float* keys = args.rotation ? b.rotated : b.plain;
    if (args.rotation) {
      switch (count) {
        case 1: rotate_lanes<1, 16>(b.plain, unit, dim, args.rotation, b.rotated); break;
        case 2: rotate_lanes<2, 8>(b.plain, unit, dim, args.rotation, b.rotated); break;
        default: rotate_lanes<3, 8>(b.plain, unit, dim, args.rotation, b.rotated); break;
      }
    }
    for (int64_t u = 0; u < count; ++u) {
      units.write(i + u, 0, keys + u * unit, b.codes);
      load_lanes(units.value(i + u), b.pairs, b.plain + u * unit);
      units.write(i + u, 1, b.plain + u * unit, b.codes);
    }
  }
}

void write_tiles_amx(const KVWriteArgs& args, const int64_t* tiles, int64_t begin, int64_t end) {
  const TileUnits units{args, tiles};
  const TileBuffers b(args.page, kTogether, 1);
  const uint8_t* split = static_cast<const uint8_t*>(args.prepared);
  const TileScope scope{TileShapes{}};
  for (int64_t i = begin; i < end; i += kTogether) {
    const int64_t count = min(end - i, kTogether);
    for (int64_t u = 0; u < count; ++u) load_pairs(units.key(i + u), b.pairs + u * b.dims * 8);
    tile_fence();
    switch (count) {
      case 1: rotate_tiles<1>(b.pairs, args.page, split, b.rotated); break;
      case 2: rotate_tiles<2>(b.pairs, args.page, split, b.rotated); break;
      case 3: rotate_tiles<3>(b.pairs, args.page, split, b.rotated); break;
      default: rotate_tiles<4>(b.pairs, args.page, split, b.rotated); break;
    }
    for (int64_t u = 0; u < count; ++u) {
      units.write(i + u, 0, b.rotated + u * b.dims * 16, b.codes);
      load_lanes(units.value(i + u), b.pairs, b.plain);
      units.write(i + u, 1, b.plain, b.codes);
    }
  }
}

}  // namespace
}  // namespace resq
