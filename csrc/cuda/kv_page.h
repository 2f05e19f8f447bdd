// A page of the packed KV cache of one kv head (resq_vllm/formats/kv_layout.py): 64 tokens, 4-bit low and 8-bit high dims.
#pragma once

#include "formats.h"

namespace resq::cuda {

constexpr int kPageTokens = 64;

template <int kHeadDim_, int kHigh_>
struct KvPage {
  static constexpr int kHeadDim = kHeadDim_, kHigh = kHigh_, kLow = kHeadDim - kHigh;
  // Bytes a token in a low and in a high plane.
  static constexpr int kLowWidth = static_cast<int>(round_up(kLow, 8)) / 2, kHighWidth = static_cast<int>(round_up(kHigh, 4));
  static constexpr int kKeyLow = 0, kKeyHigh = kPageTokens * kLowWidth, kValueLow = kKeyHigh + kPageTokens * kHighWidth;
  static constexpr int kValueHigh = kValueLow + kPageTokens * kLowWidth;
  // float16 scales, then uint8 zero points: [keys' low, keys' high, values' low, values' high][token].
  static constexpr int kScales = kValueHigh + kPageTokens * kHighWidth, kZeros = kScales + 4 * 2 * kPageTokens;
  static constexpr int kBytes = kZeros + 4 * kPageTokens;
  static_assert(kHigh > 0 && kHigh <= 16 && kHigh % 4 == 0 && kBytes % 16 == 0);
};

}  // namespace resq::cuda
