// float16 and bfloat16 <-> float32, round half to even; rows of any supported dtype.
#pragma once

#include "vec.h"

namespace resq {
namespace {

RESQ_INLINE float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

RESQ_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

RESQ_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7FFF;
  // Moved to float32's fields, the exponent is short of 127 - 15; the multiplication also normalises subnormals.
  uint32_t bits = bits_of_float(float_of_bits(rest << 13) * 0x1p112f);
  if (rest >= 0x7C00) bits = 0x7F800000u | (rest << 13);
  return float_of_bits(sign | bits);
}

RESQ_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000u) return sign | 0x7E00;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: units of 2^-24
    return static_cast<uint16_t>(sign | round_to_int(float_of_bits(magnitude) * 0x1p24f));
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

RESQ_INLINE float bfloat_to_float(uint16_t b) { return float_of_bits(static_cast<uint32_t>(b) << 16); }

RESQ_INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

RESQ_INLINE VF load_half(const uint16_t* p) {
#if defined(RESQ_TU_AVX512)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(RESQ_TU_AVX2)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}

RESQ_INLINE void store_half(uint16_t* p, VF v) {
#if defined(RESQ_TU_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(RESQ_TU_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = float_to_half(v[i]);
#endif
}

RESQ_INLINE VF load_bfloat(const uint16_t* p) {
#if defined(RESQ_TU_AVX512)  // g++ 12 widens the halves of such a vector one after the other
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
  return (VF)(__builtin_convertvector(*reinterpret_cast<const VHMem*>(p), VU) << 16);
}

// bfloat16 in the upper halves of the words, whatever in the lower ones.
RESQ_INLINE VU bfloat_words(VF v) {
  const VU bits = (VU)v;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}
RESQ_INLINE void store_bfloat(uint16_t* p, VF v) {
  *reinterpret_cast<VHMem*>(p) = __builtin_convertvector(bfloat_words(v) >> 16, VH);
}
#if defined(RESQ_TU_AVX512)
// 32 values, a cache line of bfloat16.
RESQ_INLINE __m512i bfloats(VF low, VF high) {
  alignas(64) static constexpr struct UpperHalves {
    uint16_t at[32];
    constexpr UpperHalves() : at() {
      for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
    }
  } upper;
  const __m512i order = _mm512_load_si512(upper.at);
  return _mm512_permutex2var_epi16((__m512i)bfloat_words(low), order, (__m512i)bfloat_words(high));
}
#endif

RESQ_INLINE int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

RESQ_INLINE const void* element(const void* base, DType dtype, int64_t index) {
  return static_cast<const uint8_t*>(base) + index * dtype_size(dtype);
}
RESQ_INLINE void* element(void* base, DType dtype, int64_t index) {
  return static_cast<uint8_t*>(base) + index * dtype_size(dtype);
}

// n values of `dtype` at x -> float32 at out.
[[maybe_unused]] void load_row(const void* x, DType dtype, int64_t n, float* out) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    __builtin_memcpy(out, x, static_cast<size_t>(n) * 4);
  } else if (dtype == DType::f16) {
    const uint16_t* p = static_cast<const uint16_t*>(x);
    for (; i + W <= n; i += W) store(out + i, load_half(p + i));
    for (; i < n; ++i) out[i] = half_to_float(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x);
    for (; i + W <= n; i += W) store(out + i, load_bfloat(p + i));
    for (; i < n; ++i) out[i] = bfloat_to_float(p[i]);
  }
}

// n float32 values at x -> `dtype` at out.
[[maybe_unused]] void store_row(const float* x, DType dtype, int64_t n, void* out) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    __builtin_memcpy(out, x, static_cast<size_t>(n) * 4);
  } else if (dtype == DType::f16) {
    uint16_t* p = static_cast<uint16_t*>(out);
    for (; i + W <= n; i += W) store_half(p + i, load(x + i));
    for (; i < n; ++i) p[i] = float_to_half(x[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(out);
    for (; i + W <= n; i += W) store_bfloat(p + i, load(x + i));
    for (; i < n; ++i) p[i] = float_to_bfloat(x[i]);
  }
}

}  // namespace
}  // namespace resq
