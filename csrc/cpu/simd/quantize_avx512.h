// Quantization at 64 values a step, with divisions that cost four multiply-adds and round as the division does.
//
// vdivps takes 16 cycles a vector, more than everything else of the quantization together. Markstein's theorem: with r
// the correctly rounded 1/d and q0 within one unit in the last place of x/d, fma(x − d·q0, r, q0) is the correctly
// rounded x/d as long as the remainder is exact. q0 = x·r + x·t, t being what r lacks of 1/d, is off by half a unit and a
// trace. The remainder is exact unless it underflows: with d in [2^-96, 2^96] that is only possible for |x/d| < 1/4, which
// is rounded to 0 either way.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr bool kFastQuotients = true;

struct Divisor {
  float d, r, t;

  RESQ_INLINE explicit Divisor(float divisor)
      : d(divisor), r(1.0f / divisor), t(__builtin_fmaf(-d, r, 1.0f) * r) {}

  RESQ_INLINE bool exact() const { return d >= 0x1p-96f && d <= 0x1p96f; }
};

// A Divisor in every lane.
struct Quotients {
  VF d, r, t;

  RESQ_INLINE explicit Quotients(const Divisor& by) : d(splat(by.d)), r(splat(by.r)), t(splat(by.t)) {}

  RESQ_INLINE VF of(VF x) const {
    const VF q = fma(x, r, x * t);
    return fma(fma(-q, d, x), r, q);
  }
};

// q − offset of n values x/root to `codes`; returns their sum. Saturating packs do the clamping: to [−128, 127] for an
// offset of 128 and 255 levels, to [0, 255] and then the levels for an offset of 0.
template <bool kRoot>
int32_t quantize_fast(const float* x, int64_t n, const Divisor& root, const Divisor& scale, int32_t zero, int32_t levels,
                      int32_t offset, int8_t* codes) {
  const Quotients by_root(root), by_scale(scale);
  const VI shift = splat(zero - kRoundMagicBits - offset);
  const __m512i top = _mm512_set1_epi8(static_cast<char>(levels)), ones = _mm512_set1_epi8(1);
  // The packs work within 128-bit lanes: word 4·lane + v of the result comes from vector v.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sums = _mm512_setzero_si512();
  const auto codes_of = [&](const VF (&values)[4]) __attribute__((always_inline)) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const VF value = kRoot ? by_root.of(values[v]) : values[v];
      q[v] = (__m512i)((VI)(by_scale.of(value) + kRoundMagic) + shift);
    }
    const __m512i one = _mm512_packs_epi32(q[0], q[1]), two = _mm512_packs_epi32(q[2], q[3]);
    const __m512i bytes = offset ? _mm512_packs_epi16(one, two) : _mm512_min_epu8(_mm512_packus_epi16(one, two), top);
    return _mm512_permutexvar_epi32(order, bytes);
  };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const VF values[4] = {load(x + i), load(x + i + W), load(x + i + 2 * W), load(x + i + 3 * W)};
    const __m512i bytes = codes_of(values);
    _mm512_storeu_si512(codes + i, bytes);
    sums = _mm512_dpbusd_epi32(sums, ones, bytes);
  }
  if (i < n) {
    const VF values[4] = {load_part(x + i, n - i), load_part(x + i + W, n - i - W), load_part(x + i + 2 * W, n - i - 2 * W),
                          load_part(x + i + 3 * W, n - i - 3 * W)};
    const __mmask64 used = (uint64_t{1} << (n - i)) - 1;
    const __m512i bytes = _mm512_maskz_mov_epi8(used, codes_of(values));
    _mm512_mask_storeu_epi8(codes + i, used, bytes);
    sums = _mm512_dpbusd_epi32(sums, ones, bytes);
  }
  return _mm512_reduce_add_epi32(sums);
}

}  // namespace
}  // namespace resq
