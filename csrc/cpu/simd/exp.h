// exp(x) for x <= 0, the only one a softmax needs.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// x = n·ln 2 + r, |r| <= ln 2 / 2; the Taylor polynomial of degree 7 leaves 5e-9 of relative error, below float32's
// rounding. Results under 2^-125 are flushed to 0, and so is exp(-inf).
RESQ_INLINE VF exp_negative(VF x) {
  const VF clipped = max(x, splat(-87.0f));
  const VI n = round_to_int(clipped * 1.44269504f);
  const VF count = to_float(n);
  // ln 2 in two parts, the first with few enough bits that its multiples are exact.
  VF r = fma(count, splat(-0.693145751953125f), clipped);
  r = fma(count, splat(-1.42860677e-6f), r);
  VF p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const VF power = (VF)((n + 127) << 23);
  return x < -87.0f ? VF{} : p * power;
}

}  // namespace
}  // namespace resq
