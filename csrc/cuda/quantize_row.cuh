// From values to packed codes, shared by the kernels: ranges by group, scales, staging, packing.
//
// Codes are staged in shared memory a byte each, at their place in part order, and leave packed, 16 bytes a thread: any
// plan, with any number of columns in its segments, then has aligned and coalesced stores.
#pragma once

#include "warp.cuh"

namespace resq::cuda {

// Zeroes ranges and staging row, and copies the spans to where lanes can read different ones at once.
__device__ __forceinline__ void begin_row(const QuantizeArgs& args, RowState& state, uint8_t* staging) {
  const int tid = threadIdx.x, threads = blockDim.x;
  for (int i = tid; i <= args.spans; i += threads) state.span[i] = args.span[i];
  for (int i = tid; i < args.groups; i += threads) state.low[i] = state.high[i] = 0;
  for (int i = tid * 16; i < args.staging; i += threads * 16) *reinterpret_cast<Eight<uint16_t>*>(staging + i) = {};
}

// The span that holds `column`.
__device__ __forceinline__ int find_span(const QuantizeArgs& args, const RowState& state, int column) {
  int first = 0, count = args.spans;
  while (count > 1) {
    const int half = count >> 1;
    const bool upper = static_cast<int>(state.span[first + half].column) <= column;
    first += upper ? half : 0;
    count = upper ? count - half : half;
  }
  return first;
}

// Widens the ranges of the groups that columns [column, column + 8) belong to; beyond `columns` the values must be 0.
// All lanes of the warp call it together.
__device__ __forceinline__ void widen_ranges(const QuantizeArgs& args, RowState& state, int column,
                                             const float (&x)[kVector]) {
  const int span = column < args.columns ? find_span(args, state, column) : 0;
  float low = 0.0f, high = 0.0f;
  uint32_t group = state.span[span].group;
  const bool whole = column + kVector <= static_cast<int>(state.span[span + 1].column) || column >= args.columns;
  if (whole) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      low = fmaxf(low, -x[i]);
      high = fmaxf(high, x[i]);
    }
  } else {
    int s = span;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i < args.columns) {
        while (column + i >= static_cast<int>(state.span[s + 1].column)) ++s;
        const uint32_t g = state.span[s].group;
        atomicMax(x[i] < 0.0f ? &state.low[g] : &state.high[g], float_bits(fabsf(x[i])));
      }
    }
  }
  // Lanes of one group first agree among themselves: a shared-memory atomic by every lane would be 32 of them in turn.
  const uint32_t peers = __match_any_sync(kFullWarp, group);
  const uint32_t lowest = __reduce_max_sync(peers, float_bits(low)), highest = __reduce_max_sync(peers, float_bits(high));
  if ((threadIdx.x & 31) == static_cast<uint32_t>(__ffs(static_cast<int>(peers)) - 1)) {
    atomicMax(&state.low[group], lowest);
    atomicMax(&state.high[group], highest);
  }
}

// Scales and zero points of the CTA's groups, to memory and for quantize_eight. `root`: what the values are still to be
// divided by; division is monotonic, so the quotients' extrema are the extrema's quotients.
__device__ __forceinline__ void make_scales(const QuantizeArgs& args, RowState& state, int row, int block, float root) {
  for (int g = threadIdx.x; g < args.groups; g += blockDim.x) {
    const Group group = args.group[g];
    const float low = -divide(bits_float(state.low[g]), root), high = divide(bits_float(state.high[g]), root);
    const GroupScale made = GroupScale::of(low, high, (1 << group.bits) - 1);
    state.divisor[g] = Divisor::of(made.scale);
    state.zero[g] = made.zero;
    const int64_t at = static_cast<int64_t>(row) * args.scale_groups + group.index + static_cast<int64_t>(block) * group.step;
    args.scale[at] = made.scale;
    args.zero[at] = made.zero;
  }
}

// The codes' arithmetic for the columns of one group.
struct Quantizer {
  Divisor by;
  int32_t zero, levels;

  __device__ __forceinline__ Quantizer(const QuantizeArgs& args, const RowState& state, uint32_t group)
      : by(state.divisor[group]), zero(state.zero[group]), levels((1 << args.group[group].bits) - 1) {}

  __device__ __forceinline__ uint32_t operator()(float x) const {
    return clamp_code(round_to_int(by.quotient(x)) + zero, levels);
  }
};

// Codes of columns [column, column + 8) to the staging row; the values are still to be divided by `root`.
__device__ __forceinline__ void quantize_eight(const QuantizeArgs& args, const RowState& state, int column,
                                               float (&x)[kVector], const Divisor& root, uint8_t* staging) {
  if (column >= args.columns) return;
  int s = find_span(args, state, column);
  Span span = state.span[s];
  int end = state.span[s + 1].column;
  Quantizer quantize(args, state, span.group);
  if (root.d != 1.0f) {
    // A quotient below the normal numbers is not rounded by Divisor as a division rounds it.
    const bool tiny = quantize.by.power > 1.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = tiny ? divide(x[i], root.d) : root.quotient(x[i]);
  }
  uint8_t* to = staging + span.at + (column - span.column);
  if (column + kVector <= end && reinterpret_cast<uintptr_t>(to) % kVector == 0) {
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kVector; ++i) word[i / 4] |= quantize(x[i]) << (8 * (i % 4));
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    words[0] = word[0];
    words[1] = word[1];
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int c = column + i;
    if (c < args.columns) {
      while (c >= end) {
        span = state.span[++s];
        end = state.span[s + 1].column;
        quantize = Quantizer(args, state, span.group);
      }
      staging[span.at + (c - span.column)] = static_cast<uint8_t>(quantize(x[i]));
    }
  }
}

// The staging row, packed, to its place in the row of codes.
__device__ __forceinline__ void write_codes(const QuantizeArgs& args, int row, int block, const uint8_t* staging) {
  struct alignas(16) Words {
    uint32_t word[4];
  };
  const int tid = threadIdx.x, threads = blockDim.x;
  for (const PartOut& part : args.part) {
    if (!part.codes) continue;
    uint8_t* out = args.codes + row * args.row_bytes + part.out + block * part.block_step;
    const uint8_t* from = staging + part.staged;
    const int bytes = static_cast<int>(stored_bytes(part.codes, part.store));
    const int total = bytes + (block == args.blocks - 1 ? part.tail : 0);
    if (args.codes_aligned) {
      for (int at = tid * 16; at < total; at += threads * 16) {
        Words words{};
        if (at < bytes) {
          if (part.store == Store::u4) {
            const Words first = *reinterpret_cast<const Words*>(from + 2 * at);
            const Words second = *reinterpret_cast<const Words*>(from + 2 * at + 16);
            words.word[0] = pack_nibbles(first.word[0], first.word[1]);
            words.word[1] = pack_nibbles(first.word[2], first.word[3]);
            words.word[2] = pack_nibbles(second.word[0], second.word[1]);
            words.word[3] = pack_nibbles(second.word[2], second.word[3]);
          } else {
            words = *reinterpret_cast<const Words*>(from + at);
          }
        }
        *reinterpret_cast<Words*>(out + at) = words;
      }
    } else {
      // Codes in x's column order (the op quantize_activation), a row of which may have any width.
      for (int at = tid; at < total; at += threads) out[at] = from[at];
    }
  }
}

}  // namespace resq::cuda
