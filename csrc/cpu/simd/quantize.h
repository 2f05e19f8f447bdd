// Per-token asymmetric activation quantization: codes, scales, zero points and the sums that the GEMM's offsets need.
//
// s = (max − min)/(2^b − 1) by a true division, z = rne(−min/s), q = clamp(rne(x/s) + z, 0, 2^b − 1), all in float32 as
// torch computes them, so codes equal resq_vllm.reference.quantize_activation bit for bit.
#pragma once

#include "hadamard.h"

namespace resq {
namespace {

// The GEMM's signed operand holds q of 4-bit groups as it is and q − 128 of 8-bit groups.
RESQ_INLINE int32_t code_offset(int32_t bits) { return bits == 8 ? 128 : 0; }

RESQ_INLINE void widen_range(const float* x, int64_t n, float& low, float& high) {
  VF lows = splat(low), highs = splat(high);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const VF v = load(x + i);
    lows = min(lows, v);
    highs = max(highs, v);
  }
  low = reduce_min(lows);
  high = reduce_max(highs);
  for (; i < n; ++i) {
    low = min(low, x[i]);
    high = max(high, x[i]);
  }
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

// Blocks [block_begin, block_end) of one row.
void quantize_blocks(const QuantizeArgs& args, int64_t row, int64_t block_begin, int64_t block_end) {
  const PlanView& plan = args.plan;
  const SegmentPlace* first = plan.segments + plan.block_segments[block_begin];
  const SegmentPlace* last = plan.segments + plan.block_segments[block_end] - 1;
  const int64_t column = first->column, columns = last->column + last->columns - column;
  float* x = static_cast<float*>(thread_scratch(Slot::activation_row, columns * 4));
  load_row(element(args.x, args.dtype, row * args.row_stride + column), args.dtype, columns, x);
  if (args.hadamard.groups) {
    const int64_t n = plan.columns / args.hadamard.groups;
    hadamard_blocks(x, columns / n, n, args.hadamard.k, args.hadamard.dense);
  }

  float* low = static_cast<float*>(thread_scratch(Slot::group_range, plan.n_groups * 8));
  float* high = low + plan.n_groups;
  float* scale = args.scale + row * plan.n_groups;
  int32_t* zero = args.zero + row * plan.n_groups;
  const int32_t* groups = plan.group_list + plan.block_groups[block_begin];
  const int64_t n_groups = plan.block_groups[block_end] - plan.block_groups[block_begin];
  for (int64_t i = 0; i < n_groups; ++i) low[groups[i]] = high[groups[i]] = 0.0f;  // the range includes 0
  for (const SegmentPlace* s = first; s <= last; ++s)
    widen_range(x + (s->column - column), s->columns, low[s->group], high[s->group]);
  for (int64_t i = 0; i < n_groups; ++i) {
    const int32_t g = groups[i];
    const float step = (high[g] - low[g]) / static_cast<float>((1 << plan.group_bits[g]) - 1);
    scale[g] = step == 0.0f ? 1.0f : step;
    zero[g] = round_to_int(-low[g] / scale[g]);
  }

  int8_t* codes = static_cast<int8_t*>(args.codes) + row * args.code_stride;
  int32_t* sums = args.column_order ? nullptr : args.sums + row * plan.n_runs;
  if (sums)
    for (const SegmentPlace* s = first; s <= last; ++s) sums[s->run] = 0;
  for (const SegmentPlace* s = first; s <= last; ++s) {
    const int32_t g = s->group, bits = plan.group_bits[g];
    const float* from = x + (s->column - column);
    const int32_t levels = (1 << bits) - 1;
    if (args.column_order) {
      quantize_span(from, s->columns, scale[g], zero[g], levels, 0, codes + s->column);
    } else {
      sums[s->run] += quantize_span(from, s->columns, scale[g], zero[g], levels, code_offset(bits), codes + s->at);
      __builtin_memset(codes + s->at + s->columns, 0, static_cast<size_t>(s->pad));
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
