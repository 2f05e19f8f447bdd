// Small AVX-512 helpers of the attention paths.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// to[i] = from[i] − less for i < n; `from` is aligned to 64 and readable to the next multiple of 16.
RESQ_INLINE void copy_less(const float* from, int64_t n, __m512 less, float* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_sub_ps(_mm512_load_ps(from + i), less));
  }
}

// Lanes of a tile of 16 keys from `key` on that lie in [begin, end).
RESQ_INLINE __mmask16 keys_seen(int64_t key, __m512i begin, __m512i end) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i t = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(key)));
  return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(t, begin), t, end);
}

// A bound on keys, relative to a block of `keys` of them.
RESQ_INLINE __m512i key_bound(int64_t bound, int64_t keys) {
  return _mm512_set1_epi32(static_cast<int>(min(max(bound, int64_t{0}), keys)));
}

}  // namespace
}  // namespace resq
