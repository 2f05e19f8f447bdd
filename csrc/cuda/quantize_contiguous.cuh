// Per-token quantization, after RMSNorm where kNorm, of the rows of quantize_contiguous.h. A thread holds its share of the
// row in registers from the first load to the codes' store, 8 columns a vector, and every vector has one group.
//
// What few rows have (NaN, infinities, scales near the ends of float32, codes that clamping lowers) is found where scales
// are made, once a row, and takes the arithmetic of quantize_row.cuh; the others need neither clamping nor checks.
#pragma once

#include "packed.h"
#include "quantize_contiguous.h"
#include "warp.cuh"

namespace resq::cuda {

// What a thread needs of a piece to make codes.
struct alignas(16) PieceScale {
  float reciprocal, divisor;
  uint32_t offset;  // added to a word of codes: the zero point less kRoundingBits, at every code's place
  int32_t nibbles;
  uint8_t* codes;  // where the row's first vector would lie, were it of this piece
};

// What it needs besides where the row is unusual.
struct UnusualPiece {
  Divisor by;
  float least, most;  // quotients of codes 0 and `levels`
};

struct alignas(16) PieceRanges {
  uint32_t low[2], high[2];  // magnitudes of the least value below 0 and the greatest above it, bits in the upper half
};

struct ContiguousState {
  PieceRanges range[32];  // by warp
  PieceScale scale[2];
  UnusualPiece unusual[2];
  int32_t usual[2];  // by piece
  int32_t has_nan;
  float scratch[32];
};
constexpr int kContiguousShared = static_cast<int>(round_up(sizeof(ContiguousState), 16));

struct alignas(16) FourPairs {
  uint32_t pair[kVector / 2];
};

// Added to a number below 2^22, it leaves the number rounded to an integer, half to even, in the low bits.
constexpr float kRounding = 12582912.0f;  // 1.5 · 2^23
constexpr uint32_t kRoundingBits = 0x4b400000u;

// This thread's share of a row of `vectors` vectors, 0 beyond.
template <int kHeld>
__device__ __forceinline__ void load_share(const void* row, int vectors, FourPairs (&share)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    share[i] = vector < vectors ? static_cast<const FourPairs*>(row)[vector] : FourPairs{};
  }
}

// Adds the residual to the share, and replaces it.
template <class T, int kHeld>
__device__ __forceinline__ void add_residual(const ContiguousArgs& args, FourPairs (&held)[kHeld]) {
  FourPairs* residual = reinterpret_cast<FourPairs*>(static_cast<T*>(args.residual) +
                                                     static_cast<int64_t>(blockIdx.x) * args.residual_stride);
  FourPairs more[kHeld];
  load_share(residual, args.vectors, more);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) held[i].pair[j] = add_pairs<T>(held[i].pair[j], more[i].pair[j]);
    if (vector < args.vectors) residual[vector] = held[i];
  }
}

// RMSNorm's factor; each thread sums its squares in the order of quantize_kernel.cuh.
template <class T, int kHeld>
__device__ __forceinline__ float norm_factor(const ContiguousArgs& args, const FourPairs (&held)[kHeld], float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float first = first_of<T>(held[i].pair[j]), second = second_of<T>(held[i].pair[j]);
      sum = fused(second, second, fused(first, first, sum));
    }
  return rsqrtf(divide(cta_sum(sum, scratch), static_cast<float>(args.columns)) + args.epsilon);
}

// Adds the residual and norms the share.
template <class T, int kHeld>
__device__ __forceinline__ void norm_share(const ContiguousArgs& args, FourPairs (&held)[kHeld], float* scratch) {
  FourPairs weight[kHeld];
  // One vector: everything is on its way at once. More: the registers are taken until the sum is known, and the CTAs
  // of a processor share its cached copy of the weight.
  if constexpr (kHeld == 1) load_share(args.weight, args.vectors, weight);
  if (args.residual) add_residual<T>(args, held);
  const float factor = norm_factor<T>(args, held, scratch);
  if constexpr (kHeld > 1) load_share(args.weight, args.vectors, weight);
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t& pair = held[i].pair[j];
      const uint32_t normed = pair_of<T>(first_of<T>(pair) * factor, second_of<T>(pair) * factor);
      pair = multiply_pairs<T>(normed, weight[i].pair[j]);
    }
}

// The ranges of the warp's values, to shared memory. Vectors beyond the row are 0, which every range holds anyway.
template <class T, int kHeld>
__device__ __forceinline__ void find_ranges(const ContiguousArgs& args, const FourPairs (&held)[kHeld],
                                            PieceRanges* range) {
  const int tid = threadIdx.x, threads = blockDim.x;
  uint32_t low[2] = {0, 0}, high[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const uint32_t(&p)[4] = held[i].pair;
    const uint32_t least = min_pairs<T>(min_pairs<T>(p[0], p[1]), min_pairs<T>(p[2], p[3]));
    const uint32_t most =
        max_pairs_or_nan<T>(max_pairs_or_nan<T>(p[0], p[1]), max_pairs_or_nan<T>(p[2], p[3]));
    if (tid + i * threads < args.piece[0].vectors) {
      low[0] = min_pairs<T>(low[0], least);
      high[0] = max_pairs_or_nan<T>(high[0], most);
    } else {
      low[1] = min_pairs<T>(low[1], least);
      high[1] = max_pairs_or_nan<T>(high[1], most);
    }
  }
  PieceRanges of_warp;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint32_t least = min_pairs<T>(low[p], low[p] << 16), most = max_pairs_or_nan<T>(high[p], high[p] << 16);
    // Without their signs, bits have the order of the numbers, and a NaN is greater than all of them.
    of_warp.low[p] = __reduce_max_sync(kFullWarp, least & 0x7fff0000u);
    of_warp.high[p] = __reduce_max_sync(kFullWarp, most & 0x7fff0000u);
  }
  if ((tid & 31) == 0) range[tid >> 5] = of_warp;
}

// Scales and zero points, by the first warp, a lane for a piece: to memory, and for make_codes. None where there is a NaN.
template <class T>
__device__ __forceinline__ void make_piece_scales(const ContiguousArgs& args, ContiguousState& state) {
  const int lane = threadIdx.x, warps = (blockDim.x + 31) >> 5;
  PieceRanges all = {};
  if (lane < warps) all = state.range[lane];
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    all.low[p] = __reduce_max_sync(kFullWarp, all.low[p]);
    all.high[p] = __reduce_max_sync(kFullWarp, all.high[p]);
  }
  if (args.one_group) {
    all.low[0] = all.low[1] = all.low[0] > all.low[1] ? all.low[0] : all.low[1];
    all.high[0] = all.high[1] = all.high[0] > all.high[1] ? all.high[0] : all.high[1];
  }
  constexpr uint32_t infinity = kBfloat<T> ? 0x7f800000u : 0x7c000000u;
  const bool has_nan = all.high[0] > infinity || all.high[1] > infinity;
  if (lane == 0) state.has_nan = has_nan;
  if (lane > 1 || has_nan) return;
  const Piece& piece = args.piece[lane];
  const float low = -second_of<T>(lane ? all.low[1] : all.low[0]), high = second_of<T>(lane ? all.high[1] : all.high[0]);
  const GroupScale made = GroupScale::of(low, high, piece.levels);
  const Divisor by = Divisor::of(made.scale);
  // The least value's code is 0; the greatest's, rounded, may be one more than there is.
  const bool usual = by.power == 1.0f && round_to_int(by.quotient(high)) + made.zero <= piece.levels;
  const uint32_t each = piece.nibbles ? 0x11111111u : 0x01010101u;
  uint8_t* const codes = args.codes + static_cast<int64_t>(blockIdx.x) * args.row_bytes + piece.at;
  state.scale[lane] = {by.r, by.d, (static_cast<uint32_t>(made.zero) - kRoundingBits) * each, piece.nibbles, codes};
  state.unusual[lane] = {by, static_cast<float>(-made.zero), static_cast<float>(piece.levels - made.zero)};
  state.usual[lane] = usual || !piece.vectors;
  if (!piece.vectors) return;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * args.scale_groups + piece.scale_index;
  args.scale[at] = made.scale;
  args.zero[at] = made.zero;
}

// x/d, so limited that rounding it gives a code. By an infinite scale it is NaN, and so limited the zero point: 0.
__device__ __forceinline__ float unusual_quotient(const UnusualPiece& piece, float x) {
  return fminf(fmaxf(piece.by.quotient(x), piece.least), piece.most);
}

template <class T, bool kUsual>
__device__ __forceinline__ void make_codes(const ContiguousArgs& args, const ContiguousState& state, const FourPairs& v,
                                           int vector) {
  const int p = vector < args.piece[0].vectors ? 0 : 1;
  const PieceScale scale = state.scale[p];
  uint32_t k[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float x = j % 2 ? second_of<T>(v.pair[j / 2]) : first_of<T>(v.pair[j / 2]);
    const float q = kUsual ? quotient_of_half(x, scale.reciprocal, scale.divisor) : unusual_quotient(state.unusual[p], x);
    k[j] = float_bits(q + kRounding);
  }
  if (scale.nibbles) {
    uint32_t word = k[7];
#pragma unroll
    for (int j = 6; j >= 0; --j) word = (word << 4) + k[j];
    reinterpret_cast<uint32_t*>(scale.codes)[vector] = word + scale.offset;
  } else {
    struct alignas(8) Words {
      uint32_t first, second;
    } words;
    words.first = (((((k[3] << 8) + k[2]) << 8) + k[1]) << 8) + k[0] + scale.offset;
    words.second = (((((k[7] << 8) + k[6]) << 8) + k[5]) << 8) + k[4] + scale.offset;
    reinterpret_cast<Words*>(scale.codes)[vector] = words;
  }
}

template <class T, bool kUsual, int kHeld>
__device__ __forceinline__ void make_share_codes(const ContiguousArgs& args, const ContiguousState& state,
                                                 const FourPairs (&held)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector < args.vectors) make_codes<T, kUsual>(args, state, held[i], vector);
  }
}

template <class T, int kHeld, bool kNorm>
__global__ void __launch_bounds__(kHeld == 1 ? kMostThreads : kHeldThreads, kHeld == 1 ? 1 : 2)
    contiguous_kernel(const __grid_constant__ ContiguousArgs args) {
  ContiguousState& state = *reinterpret_cast<ContiguousState*>(dynamic_shared());
  const int tid = threadIdx.x;
  const int64_t row = blockIdx.x;
  FourPairs held[kHeld];
  load_share(static_cast<const T*>(args.x) + row * args.x_stride, args.vectors, held);
  if constexpr (kNorm) norm_share<T>(args, held, state.scratch);

  for (;;) {
    find_ranges<T>(args, held, state.range);
    __syncthreads();
    if (tid < 32) make_piece_scales<T>(args, state);
    __syncthreads();
    if (!state.has_nan) break;
    // NaNs widen no range, and their codes are those of 0.
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) held[i].pair[j] = without_nans<T>(held[i].pair[j]);
  }

  if (state.usual[0] & state.usual[1])
    make_share_codes<T, true>(args, state, held);
  else
    make_share_codes<T, false>(args, state, held);
  uint8_t* codes = args.codes + row * args.row_bytes;
#pragma unroll
  for (int p = 0; p < 2; ++p)
    if (tid < args.piece[p].padding) reinterpret_cast<uint32_t*>(codes + args.piece[p].padding_at)[tid] = 0;
}

}  // namespace resq::cuda
