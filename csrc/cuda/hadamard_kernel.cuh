// Block Hadamard transform of a row in shared memory, of x or of silu(gate)·up, then quantization, or the values.
#pragma once

#include "hadamard_schedule.h"
#include "quantize_row.cuh"

namespace resq::cuda {

// silu(gate)·up as two ops compute it: each rounded to the model's type.
template <class T>
__device__ __forceinline__ T silu_mul(T gate, T up) {
  const float g = to_float(gate);
  const T silu = from_float<T>(divide(g, 1.0f + expf(-g)));
  return from_float<T>(to_float(silu) * to_float(up));
}

// The dense factor: every [k, width] block of `from` times H_k from the left, to `to`. A thread makes tiles of 4 rows and
// C neighbouring columns: 4 reads of 16 bytes of H and 4 of the row for 16·C multiply-adds.
template <int C>
__device__ __forceinline__ void dense_factor(const QuantizeArgs& args, const float* from, float* to) {
  struct alignas(4 * C) Columns {
    float value[C];
  };
  struct alignas(16) Four {
    float value[4];
  };
  const int k = args.hadamard_k, width = args.hadamard_n / k, across = width / C, tiles_of_block = k / 4 * across;
  const int tiles = args.columns / args.hadamard_n * tiles_of_block;
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    const int block = tile / tiles_of_block, rest = tile - block * tiles_of_block;
    const int row = rest / across * 4, column = rest % across * C;
    const float* x = from + block * args.hadamard_n + column;
    const float* h = args.dense + static_cast<int64_t>(row) * k;
    float sum[4][C] = {};
    for (int j = 0; j < k; j += 4) {
      Four sign[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) sign[r] = *reinterpret_cast<const Four*>(h + r * k + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Columns value = *reinterpret_cast<const Columns*>(x + (j + i) * width);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < C; ++c) sum[r][c] = fused(sign[r].value[i], value.value[c], sum[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Columns out;
#pragma unroll
      for (int c = 0; c < C; ++c) out.value[c] = sum[r][c];
      *reinterpret_cast<Columns*>(to + block * args.hadamard_n + (row + r) * width + column) = out;
    }
  }
}

// H_{2^m} on every `width` columns of `x` from distance kWarpColumns on.
__device__ __forceinline__ void shared_passes(float* x, int columns, int width) {
  for (int step = kWarpColumns; step < width;) {
    __syncthreads();
    const int bits = pass_bits(step, width);
    for (int item = threadIdx.x; item < columns >> bits; item += blockDim.x) {
      const int first = pass_first(item, step, 1 << bits);
      if (bits == 3) {
        pass_butterflies<3>(x, first, step);
      } else if (bits == 2) {
        pass_butterflies<2>(x, first, step);
      } else {
        pass_butterflies<1>(x, first, step);
      }
    }
    step <<= bits;
  }
}

// Columns [column, column + 8) of a row in shared memory, 0 from `columns` on.
__device__ __forceinline__ void eight_values(const float* row, int column, int columns, float (&v)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = column + i < columns ? row[column + i] : 0.0f;
}

constexpr int kHadamardThreads = 512;

template <class T>
__global__ void __launch_bounds__(kHadamardThreads) hadamard_kernel(const __grid_constant__ QuantizeArgs args) {
  const int block = blockIdx.x % args.blocks, row = blockIdx.x / args.blocks;
  const int tid = threadIdx.x, threads = blockDim.x, columns = args.columns;
  const int width = args.hadamard_n / args.hadamard_k;
  RowState& state = *reinterpret_cast<RowState*>(dynamic_shared());
  float* values = reinterpret_cast<float*>(dynamic_shared() + kStateBytes);
  uint8_t* const after = dynamic_shared() + second_buffer_at(columns, args.hadamard_k, args.staging);
  float* const second = reinterpret_cast<float*>(after);
  uint8_t* const staging = args.hadamard_k > 1 ? reinterpret_cast<uint8_t*>(values) : after;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride + static_cast<int64_t>(block) * columns;
  wait_for_previous_kernel();
  launch_dependents();

  // Whole warps enter every round: lanes exchange values.
  for (int start = tid - (tid & 31); start * kVector < columns; start += threads) {
    const int column = (start + (tid & 31)) * kVector;
    float v[kVector];
    const Eight<T> read = load_eight(x, column, columns, args.aligned);
    if (args.silu_mul) {
      const Eight<T> up = load_eight(x + static_cast<int64_t>(args.blocks) * columns, column, columns, args.aligned);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = to_float(silu_mul(read.value[i], up.value[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = to_float(read.value[i]);
    }
    butterflies_in_vector(v, width);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      if (step * kVector >= width) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        v[i] = butterfly_half(v[i], __shfl_xor_sync(kFullWarp, v[i], step), tid & 31, step);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i < columns) values[column + i] = v[i];
  }
  shared_passes(values, columns, width);
  if (args.hadamard_k > 1) {
    __syncthreads();
    if (width >= 4) {
      dense_factor<4>(args, values, second);
    } else {
      dense_factor<1>(args, values, second);
    }
    values = second;
    __syncthreads();  // `staging` lies over the first buffer
  }

  const Divisor root = Divisor::of(args.root);
  if (args.out) {
    __syncthreads();
    T* out = static_cast<T*>(args.out) + (static_cast<int64_t>(row) * args.blocks + block) * columns;
    for (int i = tid; i < columns; i += threads) out[i] = from_float<T>(divide(values[i], args.root));
    return;
  }
  begin_row(args, state, staging);
  __syncthreads();
  float v[kVector];
  for (int start = tid - (tid & 31); start * kVector < columns; start += threads) {
    const int column = (start + (tid & 31)) * kVector;
    eight_values(values, column, columns, v);
    widen_ranges(args, state, column, v);
  }
  __syncthreads();
  make_scales(args, state, row, block, args.root);
  __syncthreads();
  for (int column = tid * kVector; column < columns; column += threads * kVector) {
    eight_values(values, column, columns, v);
    quantize_eight(args, state, column, v, root, staging);
  }
  __syncthreads();
  write_codes(args, row, block, staging);
}

}  // namespace resq::cuda
