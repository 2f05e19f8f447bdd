// Rotate k by U_C, quantize k and v per token, head and part, and pack them into their pages.
//
// The page's layout is resq_vllm/formats/kv_layout.py; the rounding is resq_vllm.reference.kv_quantize: the scale is
// rounded to float16 before it is used, since that is what a page holds.
#pragma once

#include "quantize.h"

namespace resq {
namespace {

constexpr float kFloat16Max = 65504.0f;

struct PartCodes {
  uint16_t scale;  // float16
  uint8_t zero;
};

// Values i .. of x [n], 0 beyond the end: a range includes 0 anyway. A head's parts are rarely whole vectors, and the
// scalar rest took longer than the vectors.
RESQ_INLINE VF load_some(const float* x, int64_t i, int64_t n) {
  if (i + W <= n) return load(x + i);
#if defined(RESQ_TU_AVX512)
  return (VF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << (n - i)) - 1), x + i);
#else
  VF v = {};
  __builtin_memcpy(&v, x + i, static_cast<size_t>(n - i) * 4);
  return v;
#endif
}

// x [n] -> codes [n], one scale and zero point. Writes up to W - 1 bytes past the last code.
PartCodes quantize_part(const float* x, int64_t n, int32_t bits, uint8_t* codes) {
  VF lows = {}, highs = {};
  for (int64_t i = 0; i < n; i += W) {
    const VF v = load_some(x, i, n);
    lows = min(lows, v);
    highs = max(highs, v);
  }
  const float low = reduce_min(lows), high = reduce_max(highs);
  const int32_t levels = (1 << bits) - 1;
  float step = (high - low) / static_cast<float>(levels);
  step = half_to_float(float_to_half(min(step, kFloat16Max)));
  if (step == 0.0f) step = 1.0f;
  // x/s may exceed the range of the rounding trick when the scale was cut to 65504; beyond the clamp nothing changes.
  const float limit = 4096.0f;
  int32_t zero = round_to_int(max(min(-low / step, limit), 0.0f));
  if (zero > levels) zero = levels;
  for (int64_t i = 0; i < n; i += W) {
    const VF ratio = max(min(load_some(x, i, n) / step, splat(limit)), splat(-limit));
    const VI q = min(max(round_to_int(ratio) + zero, VI{}), splat(levels));
    *reinterpret_cast<VBMem*>(codes + i) = __builtin_convertvector(q, VB);
  }
  return {float_to_half(step), static_cast<uint8_t>(zero)};
}

// 8-bit plane of K: groups of 4 dims, 16 tokens side by side.
void pack_key_bytes(uint8_t* plane, int64_t token, const uint8_t* codes, int64_t width) {
  uint8_t* tile = plane + (token / kTokenTile) * (width / 4) * 64 + (token % kTokenTile) * 4;
  for (int64_t g = 0; g < width / 4; ++g) __builtin_memcpy(tile + g * 64, codes + 4 * g, 4);
}

void pack_key_nibbles(uint8_t* plane, int64_t token, const uint8_t* codes, int64_t width) {
  uint8_t* tile = plane + (token / kTokenTile) * (width / 8) * 64 + (token % kTokenTile) * 4;
  for (int64_t g = 0; g < width / 8; ++g) {
    uint32_t first, second;
    __builtin_memcpy(&first, codes + 8 * g, 4);
    __builtin_memcpy(&second, codes + 8 * g + 4, 4);
    first |= second << 4;  // codes are below 16: nothing crosses a byte
    __builtin_memcpy(tile + g * 64, &first, 4);
  }
}

// Byte `token` % 4 of `lanes` words. Only that byte is written: other threads write its neighbours.
template <class F>
RESQ_INLINE void put_lanes(uint8_t* words, int64_t token, int64_t lanes, const F& byte_at) {
#if defined(RESQ_TU_AVX512)
  const int shift = static_cast<int>(token % 4);
  const __mmask64 byte = 0x1111111111111111ull << shift;
  const __m128i count = _mm_cvtsi32_si128(8 * shift);
  for (int64_t c = 0; c < lanes; c += 16) {
    const __mmask64 mask = lanes - c >= 16 ? byte : byte & ((1ull << 4 * (lanes - c)) - 1);
    _mm512_mask_storeu_epi8(words + 4 * c, mask, _mm512_sll_epi32(_mm512_cvtepu8_epi32(byte_at(c)), count));
  }
#else
  for (int64_t c = 0; c < lanes; ++c) words[4 * c + token % 4] = byte_at(c);
#endif
}

// What put_lanes takes at a time; reads up to 15 codes past the last one.
#if defined(RESQ_TU_AVX512)
RESQ_INLINE __m128i some_codes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
RESQ_INLINE __m128i both_nibbles(__m128i low, __m128i high) { return _mm_or_si128(low, _mm_slli_epi16(high, 4)); }
#else
RESQ_INLINE uint8_t some_codes(const uint8_t* p) { return *p; }
RESQ_INLINE uint8_t both_nibbles(uint8_t low, uint8_t high) { return static_cast<uint8_t>(low | high << 4); }
#endif

// Planes of V: one 32-bit word per lane, 4 tokens side by side.
void pack_value_bytes(uint8_t* plane, int64_t token, const uint8_t* codes, int64_t width) {
  put_lanes(plane + (token / 4) * width * 4, token, width, [&](int64_t c) { return some_codes(codes + c); });
}

void pack_value_nibbles(uint8_t* plane, int64_t token, const uint8_t* codes, int64_t width) {
  const int64_t lanes = width / 2;
  put_lanes(plane + (token / 4) * lanes * 4, token, lanes,
            [&](int64_t c) { return both_nibbles(some_codes(codes + c), some_codes(codes + c + lanes)); });
}

// One head of one token. which: 0 = K, 1 = V.
void write_head(const PageLayout& p, uint8_t* page, int64_t token, int which, const float* x) {
  alignas(64) uint8_t codes[kMaxHeadDim + 64];
  uint8_t* scales = page + p.scales + which * p.parts * p.tokens * 2;
  uint8_t* zeros = page + p.zeros + which * p.parts * p.tokens;
  const auto put = [&](int64_t part, PartCodes q) {
    __builtin_memcpy(scales + (part * p.tokens + token) * 2, &q.scale, 2);
    zeros[part * p.tokens + token] = q.zero;
  };
  put(0, quantize_part(x, p.low, static_cast<int32_t>(p.low_bits), codes));
  for (int64_t i = p.low; i < p.low_padded; ++i) codes[i] = 0;
  uint8_t* low = page + (which ? p.value_low : p.key_low);
  if (p.low_bits == 4) {
    (which ? pack_value_nibbles : pack_key_nibbles)(low, token, codes, p.low_padded);
  } else {
    (which ? pack_value_bytes : pack_key_bytes)(low, token, codes, p.low_padded);
  }
  if (p.high) {
    put(1, quantize_part(x + p.low, p.high, 8, codes));
    for (int64_t i = p.high; i < p.high_padded; ++i) codes[i] = 0;
    uint8_t* high = page + (which ? p.value_high : p.key_high);
    (which ? pack_value_bytes : pack_key_bytes)(high, token, codes, p.high_padded);
  }
}

void kv_write_tokens(const KVWriteArgs& args, int64_t begin, int64_t end) {
  const PageLayout& p = args.page;
  const int64_t dim = p.head_dim;
  // All heads of a token go through the rotation together: one small product instead of a vector times a matrix.
  float* rows = static_cast<float*>(thread_scratch(Slot::kv_rows, 2 * args.heads * dim * 4));
  float* rotated = rows + args.heads * dim;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = args.slots[t];
    if (slot < 0) continue;
    uint8_t* block = args.cache + slot / p.tokens * args.block_stride;
    const int64_t token = slot % p.tokens;
    for (int64_t h = 0; h < args.heads; ++h)
      load_row(element(args.key, args.dtype, t * args.key_token_stride + h * args.key_head_stride), args.dtype, dim,
               rows + h * dim);
    const float* keys = rows;
    if (args.rotation) {
      gemm_f32(args.heads, dim, dim, rows, dim, args.rotation, dim, rotated, dim, false);
      keys = rotated;
    }
    for (int64_t h = 0; h < args.heads; ++h) write_head(p, block + h * args.head_stride, token, 0, keys + h * dim);
    for (int64_t h = 0; h < args.heads; ++h) {
      load_row(element(args.value, args.dtype, t * args.value_token_stride + h * args.value_head_stride), args.dtype,
               dim, rows);
      write_head(p, block + h * args.head_stride, token, 1, rows);
    }
  }
}

}  // namespace
}  // namespace resq
