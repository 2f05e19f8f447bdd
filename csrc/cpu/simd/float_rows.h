// y = x·Wᵀ for few rows of x and a bfloat16 W as it lies in the checkpoint: bound by reading W once.
//
// Words hold two neighbouring columns, a bfloat16 is the upper half of a float32: a shift and a mask make both, without an
// instruction set of its own. Sums are float32, over even and odd columns lane by lane; their order does not depend on how
// many rows or threads there are.
#pragma once

#include "convert.h"

namespace resq {
namespace {

// Rows of W that are read side by side, each from a stretch of its own (micro_avx512.h: four streams read fastest), and
// rows of x that share them while accumulators stay in registers.
constexpr int kStreams = W == 16 ? 4 : 2;
constexpr int kStreamRows = W == 16 ? 2 : 1;
constexpr int64_t kRowsAhead = 2048;  // bytes

// x's columns as float32: all pairs' first halves, then their second halves, padded with zeros to whole vectors.
void spread_columns(const uint16_t* x, int64_t columns, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; ++i) {
    to[i] = 2 * i < columns ? bfloat_to_float(x[2 * i]) : 0.0f;
    to[padded + i] = 2 * i + 1 < columns ? bfloat_to_float(x[2 * i + 1]) : 0.0f;
  }
}

RESQ_INLINE VF even_columns(VU words) { return (VF)(words << 16); }
RESQ_INLINE VF odd_columns(VU words) { return (VF)(words & 0xFFFF0000u); }

// MR rows of x with S rows of W, `stride` columns apart: sums to out[m·out_stride + s·step].
template <int MR, int S>
void dot_rows(const FloatRowsArgs& args, const uint16_t* w, int64_t stride, const float* x, float* out,
              int64_t out_stride, int64_t step) {
  const int64_t padded = args.padded, whole = args.columns / (2 * W) * (2 * W);
  VF even[MR][S], odd[MR][S];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) even[m][s] = odd[m][s] = VF{};
  const auto multiply = [&](int s, VU words, int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const float* row = x + m * 2 * padded + at;
      even[m][s] = fma(even_columns(words), load(row), even[m][s]);
      odd[m][s] = fma(odd_columns(words), load(row + padded), odd[m][s]);
    }
  };
  for (int64_t k = 0; k < whole; k += 2 * W)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint16_t* at = w + s * stride + k;
      const VU words = load_words(at);
      if (S > 1) __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + kRowsAhead);
      multiply(s, words, k / 2);
    }
  if (whole < args.columns)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      uint16_t rest[2 * W] = {};
      __builtin_memcpy(rest, w + s * stride + whole, static_cast<size_t>(args.columns - whole) * 2);
      multiply(s, load_words(rest), whole / 2);
    }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) out[m * out_stride + s * step] = reduce_add(even[m][s] + odd[m][s]);
}

// All of x with S rows of W, the later ones from the L1 cache.
template <int S>
RESQ_INLINE void all_rows(const FloatRowsArgs& args, const uint16_t* w, int64_t stride, const float* x, float* out,
                          int64_t out_stride, int64_t step) {
  int64_t m = 0;
  for (; m + kStreamRows <= args.rows; m += kStreamRows)
    dot_rows<kStreamRows, S>(args, w, stride, x + m * 2 * args.padded, out + m * out_stride, out_stride, step);
  for (; m < args.rows; ++m)
    dot_rows<1, S>(args, w, stride, x + m * 2 * args.padded, out + m * out_stride, out_stride, step);
}

// Outputs [begin, end): kStreams stretches of W at once.
void float_rows(const FloatRowsArgs& args, const float* x, int64_t begin, int64_t end) {
  const int64_t each = (end - begin) / kStreams, count = end - begin;
  float* sums = static_cast<float*>(thread_scratch(Slot::float_rows, args.rows * count * 4));
  const auto row = [&](int64_t n) { return args.weight + n * args.columns; };
  for (int64_t i = 0; i < each; ++i)
    all_rows<kStreams>(args, row(begin + i), each * args.columns, x, sums + i, count, each);
  for (int64_t i = kStreams * each; i < count; ++i) all_rows<1>(args, row(begin + i), 0, x, sums + i, count, 1);
  for (int64_t m = 0; m < args.rows; ++m) {
    float* sum = sums + m * count;
    if (args.bias)
      for (int64_t i = 0; i < count; ++i) sum[i] += bfloat_to_float(args.bias[begin + i]);
    store_row(sum, DType::bf16, count, args.out + m * args.n + begin);
  }
}

// The calling thread's copy of x, as float_rows takes it.
const float* float_rows_input(const FloatRowsArgs& args) {
  float* to = static_cast<float*>(thread_scratch(Slot::activation_row, args.rows * 2 * args.padded * 4));
  for (int64_t m = 0; m < args.rows; ++m)
    spread_columns(args.x + m * args.row_stride, args.columns, args.padded, to + m * 2 * args.padded);
  return to;
}

}  // namespace
}  // namespace resq
