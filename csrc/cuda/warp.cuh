// Words for the device that the kernels use beyond the language: loads of 8 values, sums and shared memory.
#pragma once

#include "device.h"
#include "quantize_args.h"

namespace resq::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

// Dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ uint8_t* dynamic_shared() {
#if defined(RESQ_EMULATED)
  return emulator::cta->shared.data();
#else
  extern __shared__ __align__(16) uint8_t resq_shared[];
  return resq_shared;
#endif
}

// Eight neighbouring values in the type that they have in memory.
template <class T>
struct alignas(16) Eight {
  T value[kVector];
};

// Columns [column, column + 8) of a row, 0 from `columns` on.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* row, int column, int columns, bool aligned) {
  Eight<T> v;
  if (aligned && column + kVector <= columns) {
    v = *reinterpret_cast<const Eight<T>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v.value[i] = column + i < columns ? row[column + i] : from_float<T>(0.0f);
  }
  return v;
}

template <class T>
__device__ __forceinline__ void store_eight(T* row, int column, int columns, bool aligned, const Eight<T>& v) {
  if (aligned && column + kVector <= columns) {
    *reinterpret_cast<Eight<T>*>(row + column) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i < columns) row[column + i] = v.value[i];
  }
}

// Sum over the CTA, in every thread. `scratch`: 32 floats of shared memory.
__device__ __forceinline__ float cta_sum(float x, float* scratch) {
  const int lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  if (lane == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  x = lane < warps ? scratch[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

}  // namespace resq::cuda
