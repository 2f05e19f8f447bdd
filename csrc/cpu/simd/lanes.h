// AVX-512 helpers that the decode and prefill paths share: key masks, and sums in the order of V's lanes.
#pragma once

#include "attention_rows.h"
#include "exp2.h"

namespace resq {
namespace {

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

// A row's sum as the V operand orders it: 16·low_tiles lanes for the first half of the padded low part, as many for the
// second, then the high part. `zero` is what the zero points of each part add to every lane.
struct LaneSum {
  const float* sum;
  int64_t low_tiles;
  __m512 zero[2];
};

// f(first dim, values, mask) for every 16 lanes of the padded low and high part.
template <class F>
RESQ_INLINE void for_lanes(const PageLayout& p, const LaneSum& x, const F& f) {
  const int64_t half = p.low_padded / 2;
  const auto stretch = [&](const float* from, int64_t n, int64_t dim, const __m512& zero) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
      f(dim + i, from + i, zero, mask);
    }
  };
  stretch(x.sum, half, 0, x.zero[0]);
  stretch(x.sum + 16 * x.low_tiles, half, half, x.zero[0]);
  stretch(x.sum + 32 * x.low_tiles, p.high_padded, p.low_padded, x.zero[1]);
}

// finish_row for such a sum, with the maximum in powers of 2. Whole heads go straight to `out`: through a row of
// float32, unaligned loads of what was just stored stalled for longer than the rest of it took.
[[maybe_unused]] void finish_lanes(const AttentionArgs& args, const AttentionTask& task, int64_t kv, int64_t r,
                                   const LaneSum& x, float row_max, bool seen, float denominator) {
  const PageLayout& p = args.page;
  alignas(64) float row[kMaxHeadDim + 64];
  if (task.partial_sum || args.out_dtype != DType::bf16 || p.low != p.low_padded || p.high != p.high_padded) {
    for_lanes(p, x, [&](int64_t dim, const float* from, const __m512& zero, __mmask16 mask) {
      _mm512_mask_storeu_ps(row + dim, mask, _mm512_sub_ps(_mm512_load_ps(from), zero));
    });
    finish_row(args, task, kv, r, row, seen ? row_max * kLn2 : kNegativeInfinity, denominator);
    return;
  }
  const int64_t token = task.query_row + r / args.group, head = (task.kv_head + kv) * args.group + r % args.group;
  uint16_t* out = static_cast<uint16_t*>(element(args.out, args.out_dtype,
                                                 token * args.out_token_stride + head * args.out_head_stride));
  const __m512 inverse = _mm512_set1_ps(1.0f / (denominator > 0.0f ? denominator : 1.0f));
  for_lanes(p, x, [&](int64_t dim, const float* from, const __m512& zero, __mmask16 mask) {
    const VU bits = (VU)_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(from), zero), inverse);
    const VU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const VU chosen = (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded;
    _mm256_mask_storeu_epi16(out + dim, mask, _mm512_cvtepi32_epi16((__m512i)chosen));
  });
}

}  // namespace
}  // namespace resq
