// Per-token quantization of a row as it is, or after RMSNorm (and the residual's addition).
#pragma once

#include "quantize_row.cuh"

namespace resq::cuda {

template <class T>
__device__ __forceinline__ void rms_norm(const QuantizeArgs& args, int row, Eight<T>* held, float* scratch) {
  const int tid = threadIdx.x, threads = blockDim.x;
  T* residual = static_cast<T*>(args.residual) + row * args.residual_stride;
  float sum = 0.0f;
  for (int column = tid * kVector; column < args.columns; column += threads * kVector) {
    Eight<T> v = held[column / kVector];
    if (args.residual) {
      const Eight<T> add = load_eight(residual, column, args.columns, args.aligned);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v.value[j] = from_float<T>(to_float(v.value[j]) + to_float(add.value[j]));
      store_eight(residual, column, args.columns, args.aligned, v);
      held[column / kVector] = v;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum = fused(to_float(v.value[j]), to_float(v.value[j]), sum);
  }
  const float factor = rsqrtf(divide(cta_sum(sum, scratch), static_cast<float>(args.columns)) + args.epsilon);
  for (int column = tid * kVector; column < args.columns; column += threads * kVector) {
    Eight<T> v = held[column / kVector];
    const Eight<T> weight = load_eight(static_cast<const T*>(args.weight), column, args.columns, args.aligned);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const T normed = from_float<T>(to_float(v.value[j]) * factor);
      v.value[j] = from_float<T>(to_float(normed) * to_float(weight.value[j]));
    }
    held[column / kVector] = v;
  }
}

template <class T>
__device__ __forceinline__ void eight_floats(const Eight<T>& held, float (&value)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) value[j] = to_float(held.value[j]);
}

// The row waits in shared memory in x's own type, each thread's vectors for itself: loops stay rolled for any width, and
// the registers (32: full occupancy) do not depend on it.
template <class T>
__global__ void __launch_bounds__(1024) quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  RowState& state = *reinterpret_cast<RowState*>(dynamic_shared());
  Eight<T>* held = reinterpret_cast<Eight<T>*>(dynamic_shared() + kStateBytes);
  uint8_t* staging = dynamic_shared() + quantize_shared_bytes(args.columns, sizeof(T), 0);
  const int row = blockIdx.x, tid = threadIdx.x, threads = blockDim.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  for (int column = tid * kVector; column < args.columns; column += threads * kVector)
    held[column / kVector] = load_eight(x, column, args.columns, args.aligned);
  begin_row(args, state, staging);
  if (args.weight) rms_norm(args, row, held, state.scratch);

  __syncthreads();  // the spans, and the ranges' zeros
  float value[kVector];
  // Whole warps enter every round: lanes exchange values.
  for (int start = tid - (tid & 31); start * kVector < args.columns; start += threads) {
    const int vector = start + (tid & 31);
    eight_floats(vector * kVector < args.columns ? held[vector] : Eight<T>{}, value);
    widen_ranges(args, state, vector * kVector, value);
  }
  __syncthreads();
  make_scales(args, state, row, 0, 1.0f);
  __syncthreads();
  const Divisor one{1.0f, 1.0f, 0.0f, 1.0f};
  for (int vector = tid; vector * kVector < args.columns; vector += threads) {
    eight_floats(held[vector], value);
    quantize_eight(args, state, vector * kVector, value, one, staging);
  }
  __syncthreads();
  write_codes(args, row, 0, staging);
}

}  // namespace resq::cuda
