// 2^x for x <= 0 on AVX-512, for the integer and bfloat16 attention paths.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// The polynomial (minimax on [0, 1) in relative terms) is off by 2.7e-6: far below what the weights are rounded to, and
// the same in numerator and denominator. vreduceps leaves x − floor(x), vscalefps multiplies by 2^floor(x) and lets
// everything under 2^-149 become 0: one instruction each, where rounding to an integer takes three. `unit` (a constant)
// times that.
RESQ_INLINE __m512 exp2_negative(__m512 x, float unit = 1.0f) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(unit * 0.013534167781472206f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(unit * 0.052011460065841675f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(unit * 0.2414427548646927f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(unit * 0.6930038332939148f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(unit * 1.0000026226043701f));
  return _mm512_scalef_ps(p, x);
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

}  // namespace
}  // namespace resq
