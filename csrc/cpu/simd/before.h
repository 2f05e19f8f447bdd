// What a decoder does between two linear layers, at the place where the second one reads its input: RMSNorm, with the
// addition of the residual stream, and SiLU·mul. The rounded results never pass through memory.
#pragma once

#include "convert.h"
#include "exp.h"

namespace resq {
namespace {

// Lanes of a sum of squares, the same on every ISA, so that its rounding is.
constexpr int kLanes = 16;

// v rounded to `dtype`.
RESQ_INLINE VF rounded(VF v, DType dtype) {
  if (dtype == DType::bf16) return (VF)(bfloat_words(v) & 0xFFFF0000u);
  if (dtype == DType::f32) return v;
  uint16_t half[W];
  store_half(half, v);
  return load_half(half);
}

// Floats at `x` that load_input writes.
RESQ_INLINE int64_t input_floats(const QuantizeArgs& args, int64_t columns) {
  switch (args.before.kind) {
    case Before::rms_norm: return 2 * round_up(args.plan.columns, kLanes);
    case Before::silu_mul: return round_up(columns, kLanes);
    default: return columns;
  }
}

constexpr int64_t kLineValues = 32;  // of two bytes each, in a cache line

// Fetches element i of a row that is read next. Rows lie pages apart, and hardware prefetchers stop at pages: waiting
// for the first lines of every row was 7 % of a batch of prompts.
RESQ_INLINE void fetch_ahead(const void* next, DType dtype, int64_t i) {
  __builtin_prefetch(element(next, dtype, i));
  if (dtype == DType::f32) __builtin_prefetch(element(next, dtype, i + kLineValues / 2));
}

// Columns [column, column + columns) of the normed row; the sum of squares runs over all of them. As vLLM's graph has
// it, the norm is that of the sum before it is rounded.
RESQ_INLINE void normed_row(const QuantizeArgs& args, int64_t row, int64_t column, int64_t columns, float* x) {
  const BeforeArgs& before = args.before;
  const DType dtype = args.dtype;
  const int64_t n = args.plan.columns, padded = round_up(n, kLanes);
  float* other = x + padded;
  load_row(element(args.x, dtype, row * args.row_stride), dtype, n, x);
  for (int64_t i = n; i < padded; ++i) x[i] = 0.0f;
  if (before.residual) {
    load_row(element(before.residual, dtype, row * before.residual_stride), dtype, n, other);
    for (int64_t i = n; i < padded; ++i) other[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += W) store(x + i, load(x + i) + load(other + i));
    if (before.residual_out)
      store_row(x + column, dtype, columns,
                element(before.residual_out, dtype, row * before.residual_out_stride + column));
  }
  const void* next = element(args.x, dtype, (row + 1) * args.row_stride);
  VF lanes[kLanes / W] = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    if (i % kLineValues == 0) fetch_ahead(next, dtype, i);
    for (int v = 0; v < kLanes / W; ++v) {
      const VF value = load(x + i + v * W);
      lanes[v] = lanes[v] + value * value;
    }
  }
  for (int half = kLanes / W / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) lanes[v] = lanes[v] + lanes[v + half];
  const float mean = reduce_add(lanes[0]) / static_cast<float>(n);
  const float factor = 1.0f / __builtin_sqrtf(mean + before.epsilon);
  load_row(before.weight, dtype, n, other);
  for (int64_t i = n; i < padded; ++i) other[i] = 0.0f;
  next = before.residual ? element(before.residual, dtype, (row + 1) * before.residual_stride) : nullptr;
  for (int64_t i = 0; i < padded; i += W) {
    if (next && i % kLineValues == 0) fetch_ahead(next, dtype, i);
    store(x + i, rounded(rounded(load(x + i) * factor, dtype) * load(other + i), dtype));
  }
  if (column)
    for (int64_t i = 0; i < columns; ++i) x[i] = x[column + i];
}

// SiLU(v) = v/(1 + exp(−v)), with exp of what is not positive.
RESQ_INLINE VF silu(VF v) {
  const VF e = exp_negative(v < 0.0f ? v : -v);
  return (v < 0.0f ? v * e : v) / (e + 1.0f);
}

// So many values at a time: what one stretch is fetched in, the one before is computed in.
constexpr int64_t kSiluStretch = 512;

RESQ_INLINE void silu_mul_row(const QuantizeArgs& args, int64_t row, int64_t column, int64_t columns, float* x) {
  const DType dtype = args.dtype;
  const int64_t gate = row * args.row_stride + column, up = gate + args.plan.columns;
  alignas(64) float other[kSiluStretch];
  for (int64_t at = 0; at < columns; at += kSiluStretch) {
    const int64_t n = min(kSiluStretch, columns - at), padded = round_up(n, kLanes);
    float* y = x + at;
    load_row(element(args.x, dtype, gate + at), dtype, n, y);
    load_row(element(args.x, dtype, up + at), dtype, n, other);
    for (int64_t i = n; i < padded; ++i) y[i] = other[i] = 0.0f;
    const void* next = element(args.x, dtype, gate + at + kSiluStretch);
    const void* next_up = element(args.x, dtype, up + at + kSiluStretch);
    for (int64_t i = 0; i < padded; i += W) {
      if (i % kLineValues == 0) {
        fetch_ahead(next, dtype, i);
        fetch_ahead(next_up, dtype, i);
      }
      store(y + i, rounded(rounded(silu(load(y + i)), dtype) * load(other + i), dtype));
    }
  }
}

// Columns [column, column + columns) of what is to be transformed and quantized, at x, which has room for input_floats.
void load_input(const QuantizeArgs& args, int64_t row, int64_t column, int64_t columns, float* x) {
  switch (args.before.kind) {
    case Before::rms_norm: return normed_row(args, row, column, columns, x);
    case Before::silu_mul: return silu_mul_row(args, row, column, columns, x);
    default: load_row(element(args.x, args.dtype, row * args.row_stride + column), args.dtype, columns, x);
  }
}

}  // namespace
}  // namespace resq
