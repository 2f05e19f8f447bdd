// 2^x for x <= 0 on AVX-512, for the integer attention paths.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// The polynomial (least squares at Chebyshev nodes of [-1/2, 1/2]) is off by 2.7e-6: far below what the weights are
// rounded to, and the same in numerator and denominator. vscalefps lets everything under 2^-149 become 0.
RESQ_INLINE __m512 exp2_negative(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(0.009560510516166687f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05591703951358795f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024981260299683f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931219696998596f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999991655349731f));
  return _mm512_scalef_ps(p, n);
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

}  // namespace
}  // namespace resq
