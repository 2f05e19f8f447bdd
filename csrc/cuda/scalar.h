// Arithmetic of the quantization for host and device, rounding as resq_vllm/reference.py does.
#pragma once

#include <cstdint>

#include "formats.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#include <cstring>
#endif

namespace resq::cuda {

struct f16_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

RESQ_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

RESQ_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

RESQ_HD float to_float(float x) { return x; }
RESQ_HD float to_float(bf16_t x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
RESQ_HD float to_float(f16_t x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Both normal and subnormal: the exponent is moved by a multiplication with 2^112, which is exact.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
#endif
}

// Round to nearest even.
template <class T>
RESQ_HD T from_float(float x);

template <>
RESQ_HD float from_float<float>(float x) {
  return x;
}

template <>
RESQ_HD bf16_t from_float<bf16_t>(float x) {
#if defined(__CUDA_ARCH__)
  bf16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
RESQ_HD f16_t from_float<f16_t>(float x) {
#if defined(__CUDA_ARCH__)
  f16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {0x7fffu};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from 65520 on: infinity
  // Adding 2^(e+13) lets the float unit round at binary16's last place; below 2^-14 that place is fixed at 2^-24.
  const uint32_t exponent = rest < 0x38800000u ? 0x38800000u : rest & 0x7f800000u;
  const float magic = bits_float(exponent + (13u << 23));
  const float rounded = (bits_float(rest) + magic) - magic;
  const uint32_t r = float_bits(rounded);
  if (rounded < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 0x1p24f))};
  return {static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13))};
#endif
}

// IEEE division, whatever the compiler's flags.
RESQ_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

RESQ_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Round half to even; NaN gives 0.
RESQ_HD int32_t round_to_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return x != x ? 0 : x > 2147483520.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1
                                                     : static_cast<int32_t>(std::nearbyint(x));
#endif
}

// x/d rounded as the division is, by four multiply-adds.
//
// Markstein's theorem: with r the correctly rounded 1/d and q within one unit in the last place of x/d,
// fma(x - d q, r, q) is the correctly rounded x/d as long as the remainder is exact. q = x r + x t, t being what r lacks
// of 1/d, is off by half a unit and a trace. The remainder is exact unless it underflows: with d in [2^-96, 2^96] that is
// only possible for |x/d| < 1/4, which is rounded to 0 either way. Divisors beyond that range, and the values with them,
// are first multiplied by a power of two.
struct Divisor {
  float d, r, t, power;

  RESQ_HD static Divisor of(float divisor) {
    const float power = divisor < 0x1p-96f ? 0x1p100f : divisor > 0x1p96f ? 0x1p-100f : 1.0f;
    const float d = divisor * power, r = divide(1.0f, d);
    return {d, r, fused(-d, r, 1.0f) * r, power};
  }

  RESQ_HD float quotient(float x) const {
    x *= power;
    const float q = fused(x, r, x * t);
    return fused(fused(-q, d, x), r, q);
  }
};

// x/d rounded as the division is, for d in [2^-96, 2^96] with r = 1/d and an x of at most 11 significant bits, as the 16-bit
// types have: of a quotient below 1/4 only that it is.
//
// q = x r may be off by one and a half units in the last place, too much for the theorem above: a wrong result needs an x
// within 3 parts in 2^24 of a unit of d (n + 1/2 ± half a unit), where round_to_int's answer changes. For n up to 255 there
// is one such x and d to either type, and neither gives another integer (tests/csrc/cuda/test_quantize_arithmetic.py).
RESQ_HD float quotient_of_half(float x, float r, float d) {
  const float q = x * r;
  return fused(fused(-q, d, x), r, q);
}

// Scale and zero point of a group whose values, widened to include 0, lie in [low, high].
struct GroupScale {
  float scale;
  int32_t zero;

  RESQ_HD static GroupScale of(float low, float high, int32_t levels) {
    const float step = divide(high - low, static_cast<float>(levels));
    const float scale = step == 0.0f ? 1.0f : step;
    return {scale, round_to_int(divide(-low, scale))};
  }
};

RESQ_HD uint32_t clamp_code(int32_t q, int32_t levels) {
  return static_cast<uint32_t>(q < 0 ? 0 : q > levels ? levels : q);
}

}  // namespace resq::cuda
