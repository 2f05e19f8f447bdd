// 2^x for x <= 0 on AVX-512, for the integer attention paths.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// The polynomial (least squares at Chebyshev nodes of [-1/2, 1/2]) is off by 8e-8, below float32's rounding.
// Results under 2^-126 become 2^-126.
RESQ_INLINE __m512 exp2_negative(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(0.0013266970636323094f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009675459936261177f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05550742521882057f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24022121727466583f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931469440460205f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000001192092896f));
  return _mm512_scalef_ps(p, n);
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

}  // namespace
}  // namespace resq
