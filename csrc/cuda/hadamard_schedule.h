// The order in which a CTA's threads do the butterflies of H_{2^m}: index maths for host and device.
//
// A thread holds 8 neighbouring columns: distances 1, 2 and 4 in its registers, 8 to 128 between lanes of its warp (lane l
// holds the vector after lane l - 1's), from 256 on through shared memory, up to three distances a pass. Distances are
// taken in rising order everywhere, as resq_vllm/reference.py takes them, so every sum is rounded as there.
#pragma once

#include "quantize_args.h"

namespace resq::cuda {

constexpr int kWarpColumns = 32 * kVector;  // columns a warp holds: distances below it need no shared memory

// Butterflies of the distances 1, 2, 4 below `width` in a thread's 8 columns.
RESQ_HD void butterflies_in_vector(float (&x)[kVector], int width) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int step = 1; step < kVector; step *= 2) {
    if (step >= width) break;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < kVector; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
}

// A lane's half of a butterfly with the lane at distance `step` vectors: first + second below, first - second above.
RESQ_HD float butterfly_half(float mine, float others, int lane, int step) {
  return lane & step ? others - mine : mine + others;
}

// Distances handled by the shared-memory pass that begins with distance `step` < width: 2^result of them side by side.
RESQ_HD constexpr int pass_bits(int step, int width) {
  const int left = width / step;
  return left >= 8 ? 3 : left >= 4 ? 2 : 1;
}

// First element of item `item` of a pass over `radix` elements at distance `step`; items count columns / radix.
RESQ_HD constexpr int pass_first(int item, int step, int radix) { return item / step * (step * radix) + item % step; }

// The butterflies of one item of a pass.
template <int kBits>
RESQ_HD void pass_butterflies(float* x, int first, int step) {
  constexpr int kRadix = 1 << kBits;
  float v[kRadix];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kRadix; ++i) v[i] = x[first + i * step];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int near = 1; near < kRadix; near *= 2) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < kRadix; ++i) {
      if (i & near) continue;
      const float a = v[i], b = v[i + near];
      v[i] = a + b;
      v[i + near] = a - b;
    }
  }
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kRadix; ++i) x[first + i * step] = v[i];
}

}  // namespace resq::cuda
