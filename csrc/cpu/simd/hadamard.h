// Block-diagonal Hadamard transform in float32: every block x as a [k, 2^m] matrix -> (H_k ⊗ H_{2^m}) x / sqrt(n).
//
// The butterflies and the final division round as resq_vllm.reference.block_hadamard does, so with k = 1 the result is
// equal bit for bit; the sums of the dense factor have an order of their own, which torch leaves open.
#pragma once

#include "convert.h"
#include "gemm_f32.h"

namespace resq {
namespace {

// One butterfly stage of distance H inside every vector.
template <int H>
RESQ_INLINE VF butterfly(VF v) {
  VF sign;
  for (int i = 0; i < W; ++i) sign[i] = i & H ? -1.0f : 1.0f;
  return fma(v, sign, swap_lanes<H>(v));  // v·(±1) is exact: rounds as an addition does
}

template <int H>
RESQ_INLINE VF butterflies_below(VF v, int64_t width) {
  if (H < width) v = butterfly<H>(v);
  if constexpr (2 * H < W) {
    return butterflies_below<2 * H>(v, width);
  } else {
    return v;
  }
}

// Stages of V vectors among each other.
template <int V>
RESQ_INLINE void butterflies_across(VF (&v)[V]) {
#pragma GCC unroll 4
  for (int step = 1; step < V; step *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      if (i & step) continue;
      const VF a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
}

// All stages of a stretch of V vectors, in registers.
template <int V>
RESQ_INLINE void butterflies_of_block(VF (&v)[V]) {
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) v[i] = butterflies_below<1>(v[i], W);
  butterflies_across(v);
}

constexpr int64_t kRegisterBlock = 8 * W;  // the widest of them

template <int V>
RESQ_INLINE void butterflies_in_registers(float* x) {
  VF v[V];
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) v[i] = load(x + i * W);
  butterflies_of_block(v);
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) store(x + i * W, v[i]);
}

// The stages of distances step, 2·step … V/2·step: one pass over x instead of one a stage.
template <int V>
void butterflies_apart(float* x, int64_t total, int64_t step) {
  for (int64_t j = 0; j < total; j += V * step)
    for (int64_t l = j; l < j + step; l += W) {
      VF v[V];
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) v[i] = load(x + l + i * step);
      butterflies_across(v);
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) store(x + l + i * step, v[i]);
    }
}

// Walsh-Hadamard transform (Sylvester order, not normalised) of every stretch of `width` floats; width divides total.
void walsh_hadamard(float* x, int64_t total, int64_t width) {
  int64_t i = 0, step = W;
  if (width >= 8 * W) {
    step = 8 * W;
    for (; i < total; i += step) butterflies_in_registers<8>(x + i);
  } else if (width == 4 * W) {
    step = width;
    for (; i < total; i += step) butterflies_in_registers<4>(x + i);
  } else if (width == 2 * W) {
    step = width;
    for (; i < total; i += step) butterflies_in_registers<2>(x + i);
  }
  for (; i + W <= total; i += W) store(x + i, butterflies_below<1>(load(x + i), width));
  // A tail shorter than a vector holds whole stretches, since both are powers of two apart from their number.
  for (int64_t near = 1; near < width && near < W && i < total; near *= 2)
    for (int64_t j = i; j < total; j += 2 * near)
      for (int64_t l = j; l < j + near; ++l) {
        const float a = x[l], b = x[l + near];
        x[l] = a + b;
        x[l + near] = a - b;
      }
  for (; step * 4 < width; step *= 8) butterflies_apart<8>(x, total, step);
  if (step * 2 < width) {
    butterflies_apart<4>(x, total, step);
  } else if (step < width) {
    butterflies_apart<2>(x, total, step);
  }
}

void divide(float* x, int64_t n, float divisor) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(x + i, load(x + i) / divisor);
  for (; i < n; ++i) x[i] /= divisor;
}

RESQ_INLINE float hadamard_root(int64_t n) { return static_cast<float>(__builtin_sqrt(static_cast<double>(n))); }

// In place on `blocks` neighbouring blocks of n floats.
void hadamard_blocks(float* x, int64_t blocks, int64_t n, int64_t k, const float* dense) {
  const float root = hadamard_root(n);
  if (k == 1) {
    walsh_hadamard(x, blocks * n, n);
    divide(x, blocks * n, root);
    return;
  }
  // As [k, blocks, 2^m] the dense factor is one product with blocks·2^m columns: wide vectors even where 2^m is 4.
  const int64_t width = n / k, columns = blocks * width;
  float* mixed = static_cast<float*>(thread_scratch(Slot::hadamard, 2 * k * columns * 4));
  float* rows = mixed + k * columns;
  const size_t bytes = static_cast<size_t>(width) * 4;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < k; ++i) __builtin_memcpy(rows + i * columns + b * width, x + b * n + i * width, bytes);
  walsh_hadamard(rows, k * columns, width);
  gemm_f32_stretches(k, columns, k, dense, k, rows, columns, mixed, columns, false);
  divide(mixed, k * columns, root);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < k; ++i) __builtin_memcpy(x + b * n + i * width, mixed + i * columns + b * width, bytes);
}

void hadamard_rows(const HadamardRowsArgs& args, int64_t begin, int64_t end) {
  float* row = static_cast<float*>(thread_scratch(Slot::activation_row, args.columns * 4));
  const HadamardArgs& h = args.hadamard;
  for (int64_t r = begin; r < end; ++r) {
    load_row(element(args.x, args.dtype, r * args.x_stride), args.dtype, args.columns, row);
    hadamard_blocks(row, h.groups, args.columns / h.groups, h.k, h.dense);
    store_row(row, args.dtype, args.columns, element(args.out, args.dtype, r * args.out_stride));
  }
}

}  // namespace
}  // namespace resq
