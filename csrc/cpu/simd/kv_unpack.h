// A tile of a packed page -> float32: K̂ᵀ with tokens as columns, V̂ with dims as columns.
//
// The low part's dims come first, padded, then the high part's; padding dims meet zero queries in K and are dropped
// from V. Tokens at `valid` and beyond get scale 0: what lies there may never have been written.
#pragma once

#include "convert.h"

namespace resq {
namespace {

// Scales and zero points of the 16 tokens from `token` on, as float32.
struct TileScales {
  alignas(64) float scale[kTokenTile];
  alignas(64) float zero[kTokenTile];
};

void load_scales(const PageLayout& p, const uint8_t* page, int which, int64_t part, int64_t token, int64_t valid,
                 TileScales& out) {
  const int64_t row = (which * p.parts + part) * p.tokens + token;
  load_row(page + p.scales + row * 2, DType::f16, kTokenTile, out.scale);
  for (int64_t i = 0; i < kTokenTile; ++i) {
    out.zero[i] = static_cast<float>(page[p.zeros + row + i]);
    if (i >= valid) out.scale[i] = 0.0f;
  }
}

RESQ_INLINE VF dequantize(VU code, VF scale, VF zero) { return (to_float((VI)code) - zero) * scale; }

// K plane of `width` dims, 16 tokens -> out[dim·ld + token].
template <bool kNibbles>
void unpack_key_part(const uint8_t* plane, int64_t token, int64_t width, const TileScales& s, float* out, int64_t ld) {
  constexpr int64_t dims = kNibbles ? 8 : 4;  // in a 32-bit word
  const uint8_t* tile = plane + (token / kTokenTile) * (width / dims) * 64;
  for (int64_t t = 0; t < kTokenTile; t += W) {
    const VF scale = load(s.scale + t), zero = load(s.zero + t);
    for (int64_t g = 0; g < width / dims; ++g) {
      const VU words = load_words(tile + g * 64 + t * 4);
      float* to = out + g * dims * ld + t;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (kNibbles) {
          store(to + j * ld, dequantize((words >> (8 * j)) & 15u, scale, zero));
          store(to + (4 + j) * ld, dequantize((words >> (8 * j + 4)) & 15u, scale, zero));
        } else {
          store(to + j * ld, dequantize((words >> (8 * j)) & 255u, scale, zero));
        }
      }
    }
  }
}

// One field of every lane's word, 4 tokens: out[token·ld + lane]. Writes up to W - 1 floats past the last lane.
template <int kShift, uint32_t kMask>
RESQ_INLINE void unpack_value_lanes(const uint8_t* words, int64_t lanes, const TileScales& s, int64_t token, float* out,
                                    int64_t ld) {
  for (int64_t c = 0; c < lanes; c += W) {
    const VU word = load_words(words + 4 * c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const VF scale = splat(s.scale[token + i]), zero = splat(s.zero[token + i]);
      store(out + i * ld + c, dequantize((word >> (8 * i + kShift)) & kMask, scale, zero));
    }
  }
}

void unpack_key(const PageLayout& p, const uint8_t* page, int64_t token, int64_t valid, float* out, int64_t ld) {
  TileScales s;
  load_scales(p, page, 0, 0, token, valid, s);
  if (p.low_bits == 4) {
    unpack_key_part<true>(page + p.key_low, token, p.low_padded, s, out, ld);
  } else {
    unpack_key_part<false>(page + p.key_low, token, p.low_padded, s, out, ld);
  }
  if (p.high) {
    load_scales(p, page, 0, 1, token, valid, s);
    unpack_key_part<false>(page + p.key_high, token, p.high_padded, s, out + p.low_padded * ld, ld);
  }
}

// Each step's overrun is overwritten by the next: low nibbles, high nibbles, then the high part. The reads' overrun
// stays inside the page, where scales and zero points follow the last plane.
void unpack_value(const PageLayout& p, const uint8_t* page, int64_t token, int64_t valid, float* out, int64_t ld) {
  TileScales low, high;
  load_scales(p, page, 1, 0, token, valid, low);
  if (p.high) load_scales(p, page, 1, 1, token, valid, high);
  for (int64_t t = 0; t < kTokenTile; t += 4) {
    const int64_t quad = (token + t) / 4;
    float* to = out + t * ld;
    if (p.low_bits == 4) {
      const int64_t lanes = p.low_padded / 2;
      const uint8_t* words = page + p.value_low + quad * lanes * 4;
      unpack_value_lanes<0, 15>(words, lanes, low, t, to, ld);
      unpack_value_lanes<4, 15>(words, lanes, low, t, to + lanes, ld);
    } else {
      const int64_t lanes = p.low_padded;
      unpack_value_lanes<0, 255>(page + p.value_low + quad * lanes * 4, lanes, low, t, to, ld);
    }
    if (p.high) {
      const int64_t lanes = p.high_padded;
      unpack_value_lanes<0, 255>(page + p.value_high + quad * lanes * 4, lanes, high, t, to + p.low_padded, ld);
    }
  }
}

}  // namespace
}  // namespace resq
