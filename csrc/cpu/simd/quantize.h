// Per-token asymmetric activation quantization: codes, scales, zero points and the sums that the GEMM's offsets need.
//
// s = (max − min)/(2^b − 1) by a true division, z = rne(−min/s), q = clamp(rne(x/s) + z, 0, 2^b − 1), all in float32 as
// torch computes them, so codes equal resq_vllm.reference.quantize_activation bit for bit.
#pragma once

#include "before.h"
#include "hadamard.h"
#if defined(RESQ_TU_AVX512)
#include "quantize_avx512.h"
#endif

namespace resq {
namespace {

// The GEMM's signed operand holds q of 4-bit groups as it is and q − 128 of 8-bit groups.
RESQ_INLINE int32_t code_offset(int32_t bits) { return bits == 8 ? 128 : 0; }

// Extrema of the values seen so far, lane by lane; they start at 0, which every range includes.
struct Range {
  VF low, high;

  RESQ_INLINE void widen(const float* x, int64_t n) {
    int64_t i = 0;
    if (n >= 4 * W) {
      // Four chains each: one extremum every 4 cycles would leave the ports idle.
      VF lows[4] = {low, low, low, low}, highs[4] = {high, high, high, high};
      for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const VF v = load(x + i + c * W);
          lows[c] = min(lows[c], v);
          highs[c] = max(highs[c], v);
        }
      low = min(min(lows[0], lows[1]), min(lows[2], lows[3]));
      high = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    }
    for (; i + W <= n; i += W) take(load(x + i));
#if defined(RESQ_TU_AVX512)
    if (i < n) take(load_part(x + i, n - i));
#else
    for (; i < n; ++i) take(splat(x[i]));
#endif
  }

  RESQ_INLINE void widen(const VF (&v)[8]) {
    low = min(low, min(min(min(v[0], v[1]), min(v[2], v[3])), min(min(v[4], v[5]), min(v[6], v[7]))));
    high = max(high, max(max(max(v[0], v[1]), max(v[2], v[3])), max(max(v[4], v[5]), max(v[6], v[7]))));
  }

 private:
  RESQ_INLINE void take(VF v) {
    low = min(low, v);
    high = max(high, v);
  }
};

// `low` and `high` widened to hold n values; they start at 0.
RESQ_INLINE void widen_range(const float* x, int64_t n, float& low, float& high) {
  Range range{splat(low), splat(high)};
  range.widen(x, n);
  low = reduce_min(range.low);
  high = reduce_max(range.high);
}

// q − offset of n values to `codes`; returns their sum.
RESQ_INLINE int32_t quantize_span(const float* x, int64_t n, float scale, int32_t zero, int32_t levels, int32_t offset,
                                  int8_t* codes) {
  VI sums = VI{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    VI q = round_to_int(load(x + i) / scale) + zero;
    q = min(max(q, VI{}), splat(levels)) - offset;
    sums += q;
    *reinterpret_cast<VBMem*>(codes + i) = __builtin_convertvector(q, VB);
  }
  int32_t sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += sums[lane];
  for (; i < n; ++i) {
    int32_t q = round_to_int(x[i] / scale) + zero;
    q = (q < 0 ? 0 : q > levels ? levels : q) - offset;
    sum += q;
    codes[i] = static_cast<int8_t>(q);
  }
  return sum;
}

#if !defined(RESQ_TU_AVX512)
constexpr bool kFastQuotients = false;

// What the quantization of a group needs beside its zero point.
struct Divisor {
  float d;
  RESQ_INLINE explicit Divisor(float divisor) : d(divisor) {}
};
#endif

// q − offset of n values x/root to `codes`, leaving x changed where root is not 1; returns the sum.
RESQ_INLINE int32_t quantize_segment(float* x, int64_t n, const Divisor& root, const Divisor& scale, int32_t zero,
                                     int32_t levels, int32_t offset, int8_t* codes) {
#if defined(RESQ_TU_AVX512)
  if (scale.exact())
    return root.d == 1.0f ? quantize_fast<false>(x, n, root, scale, zero, levels, offset, codes)
                          : quantize_fast<true>(x, n, root, scale, zero, levels, offset, codes);
#endif
  if (root.d != 1.0f) divide(x, n, root.d);
  return quantize_span(x, n, scale.d, zero, levels, offset, codes);
}

// Whether every Hadamard block fits the registers and lies within one segment, so that transform_segment can do it.
RESQ_INLINE bool in_registers(const HadamardArgs& hadamard, int64_t n, const SegmentPlace* first,
                              const SegmentPlace* last) {
  if (!kFastQuotients || hadamard.k != 1 || n != kRegisterBlock) return false;
  for (const SegmentPlace* s = first; s <= last; ++s)
    if (s->column % n || s->columns % n) return false;
  return true;
}

// n values that read(i) gives a vector of, transformed to x, and their extrema: one pass over memory instead of three.
template <typename Read>
RESQ_INLINE void transform_segment(const Read& read, int64_t n, float* x, Range& range) {
  for (int64_t i = 0; i < n; i += kRegisterBlock) {
    VF v[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) v[c] = read(i + c * W);
    butterflies_of_block(v);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) store(x + i + c * W, v[c]);
    range.widen(v);
  }
}

// A group's range while it is sought, its divisor after.
struct Group {
  Range range;
  Divisor scale;
};

// Blocks [block_begin, block_end) of one row.
void quantize_blocks(const QuantizeArgs& args, int64_t row, int64_t block_begin, int64_t block_end) {
  const PlanView& plan = args.plan;
  const SegmentPlace* first = plan.segments + plan.block_segments[block_begin];
  const SegmentPlace* last = plan.segments + plan.block_segments[block_end] - 1;
  const int64_t column = first->column, columns = last->column + last->columns - column;
  float* x = static_cast<float*>(thread_scratch(Slot::activation_row, input_floats(args, columns) * 4));
  const int64_t n = args.hadamard.groups ? plan.columns / args.hadamard.groups : 0;
  const bool fused = in_registers(args.hadamard, n, first, last);
  const bool direct = fused && args.before.kind == Before::nothing && args.dtype == DType::bf16;
  if (!direct) load_input(args, row, column, columns, x);
  // The transform's division by the root is left to the quantization where that can do it faster.
  float root = 1.0f;
  if (n && kFastQuotients && args.hadamard.k == 1) {
    root = hadamard_root(n);
    if (!fused) walsh_hadamard(x, columns, n);
  } else if (n) {
    hadamard_blocks(x, columns / n, n, args.hadamard.k, args.hadamard.dense);
  }

  const int64_t bytes = plan.n_groups * static_cast<int64_t>(sizeof(Group));
  Group* found = static_cast<Group*>(thread_scratch(Slot::group_range, bytes));
  float* scale = args.scale + row * plan.n_groups;
  int32_t* zero = args.zero + row * plan.n_groups;
  const int32_t* groups = plan.group_list + plan.block_groups[block_begin];
  const int64_t n_groups = plan.block_groups[block_end] - plan.block_groups[block_begin];
  for (int64_t i = 0; i < n_groups; ++i) found[groups[i]].range = {VF{}, VF{}};
  for (const SegmentPlace* s = first; s <= last; ++s) {
    Range& range = found[s->group].range;
    float* y = x + (s->column - column);
    if (direct) {
      const uint16_t* from = static_cast<const uint16_t*>(args.x) + row * args.row_stride + s->column;
      const uint16_t* next = from + args.row_stride;
      const auto read = [&](int64_t i) {
        if (i % kLineValues == 0) fetch_ahead(next, DType::bf16, i);
        return load_bfloat(from + i);
      };
      transform_segment(read, s->columns, y, range);
    } else if (fused) {
      transform_segment([&](int64_t i) { return load(y + i); }, s->columns, y, range);
    } else {
      range.widen(y, s->columns);
    }
  }
  for (int64_t i = 0; i < n_groups; ++i) {
    const int32_t g = groups[i];
    // Division is monotonic: the quotients' extrema are the extrema's quotients.
    const float low = reduce_min(found[g].range.low) / root, high = reduce_max(found[g].range.high) / root;
    const float step = (high - low) / static_cast<float>((1 << plan.group_bits[g]) - 1);
    scale[g] = step == 0.0f ? 1.0f : step;
    zero[g] = round_to_int(-low / scale[g]);
    found[g].scale = Divisor(scale[g]);
  }
  const Divisor by_root(root);

  int8_t* codes = static_cast<int8_t*>(args.codes) + row * args.code_stride;
  int32_t* sums = args.column_order ? nullptr : args.sums + row * plan.n_runs;
  if (sums)
    for (const SegmentPlace* s = first; s <= last; ++s) sums[s->run] = 0;
  for (const SegmentPlace* s = first; s <= last; ++s) {
    const int32_t g = s->group, bits = plan.group_bits[g];
    const int32_t levels = (1 << bits) - 1, offset = args.column_order ? 0 : code_offset(bits);
    int8_t* to = codes + (args.column_order ? s->column : s->at);
    const int32_t sum = quantize_segment(x + (s->column - column), s->columns, by_root, found[g].scale, zero[g],
                                         levels, offset, to);
    if (sums) {
      sums[s->run] += sum;
      __builtin_memset(to + s->columns, 0, static_cast<size_t>(s->pad));
    }
  }
}

void quantize_units(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.plan.blocks;
  for (int64_t unit = begin; unit < end;) {
    const int64_t row = unit / blocks, block = unit % blocks;
    const int64_t stop = min(blocks, block + (end - unit));
    quantize_blocks(args, row, block, stop);
    unit += stop - block;
  }
}

}  // namespace
}  // namespace resq
