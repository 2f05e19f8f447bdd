// Rotary embedding of the heads of q and k, in place: halves of a head are the coordinates that turn ("NeoX" style).
#pragma once

#include "convert.h"

namespace resq {
namespace {

// In float32, rounded once, as inductor's kernel of vLLM's RotaryEmbedding has it.
[[maybe_unused]] void rope_tokens(const RopeArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.head_dim / 2;
  alignas(64) float turn[kMaxHeadDim + W], x[kMaxHeadDim + W], first[kMaxHeadDim / 2 + W], second[kMaxHeadDim / 2 + W];
  for (int64_t t = begin; t < end; ++t) {
    load_row(element(args.cos_sin, args.dtype, args.positions[t] * args.head_dim), args.dtype, args.head_dim, turn);
    for (int64_t h = 0; h < args.heads; ++h) {
      const int64_t at = t * args.token_stride + h * args.head_dim;
      load_row(element(args.x, args.dtype, at), args.dtype, args.head_dim, x);
      for (int64_t i = 0; i < half; i += W) {
        const VF a = load(x + i), b = load(x + half + i), cos = load(turn + i), sin = load(turn + half + i);
        store(first + i, a * cos - b * sin);
        store(second + i, b * cos + a * sin);
      }
      store_row(first, args.dtype, half, element(args.x, args.dtype, at));
      store_row(second, args.dtype, half, element(args.x, args.dtype, at + half));
    }
  }
}

}  // namespace
}  // namespace resq
