// The float epilogue of a superblock for a block of rows at a time, run by run: gemm_int8.h's accumulate_run with the
// weights' scales and sums in registers, equal bit for bit.
#pragma once

#include "gemm_int8.h"

namespace resq {
namespace {

// The float epilogue of a superblock's runs.
struct Epilogue {
  const LinearArgs& args;
  int64_t column, n;
  alignas(64) float bias[kSuperblock] = {};
  // Of the current run, zero past the last column.
  alignas(64) float weight_scale[kSuperblock] = {};
  alignas(64) int32_t weight_sum[kSuperblock] = {};

  Epilogue(const LinearArgs& a, int64_t superblock)
      : args(a), column(superblock * kSuperblock), n(min(kSuperblock, a.n - column)) {
    if (args.bias) load_row(element(args.bias, args.bias_dtype, column), args.bias_dtype, n, bias);
  }

  void take_run(int64_t r) {
    const size_t bytes = static_cast<size_t>(n) * 4;
    __builtin_memcpy(weight_scale, args.weight_scale + args.plan.runs[r].scale_row * args.n + column, bytes);
    __builtin_memcpy(weight_sum, args.weight_sum + r * args.n + column, bytes);
  }

  RESQ_INLINE void* out(int64_t row) const { return element(args.out, args.out_dtype, row * args.out_stride + column); }

  // The lines of a row's output are fetched while the tiles work: consecutive rows lie pages apart.
  void fetch(int64_t row, int64_t rows) const {
    for (int64_t m = row; m < row + rows; ++m) {
      __builtin_prefetch(out(m), 1);
      __builtin_prefetch(static_cast<uint8_t*>(out(m)) + n * dtype_size(args.out_dtype) - 1, 1);
    }
  }

  // y of rows [row, row + rows) (+)= run r, whose raw products are `acc`; the last run's go to the output.
  void finish(int64_t r, int64_t row, int64_t rows, const int32_t* acc, float* y) const {
    if (r + 1 < args.plan.n_runs) {
      r == 0 ? add_run<true, false>(r, row, rows, acc, y) : add_run<false, false>(r, row, rows, acc, y);
    } else {
      r == 0 ? add_run<true, true>(r, row, rows, acc, y) : add_run<false, true>(r, row, rows, acc, y);
    }
  }

 private:
  template <bool kFirst, bool kLast>
  void add_run(int64_t r, int64_t row, int64_t rows, const int32_t* acc, float* y) const {
    const PlanView& plan = args.plan;
    const RunPlace& run = plan.runs[r];
    const int64_t runs = plan.n_runs, groups = plan.n_groups;
    const int32_t offset = code_offset(plan.group_bits[run.group]), weight_offset = run.nibbles ? 8 : 128;
    const int32_t* sums = args.sums + row * runs + r;
    const int32_t* zeros = args.zero + row * groups + run.group;
    const float* scales = args.scale + row * groups + run.group;
    const bool direct = args.out_dtype == DType::bf16 && n == kSuperblock;
    VU column_sum[4];
    VF column_scale[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      column_sum[c] = load_words(weight_sum + c * W);
      column_scale[c] = load(weight_scale + c * W);
    }
    for (int64_t m = 0; m < rows; ++m, acc += kSuperblock, y += kSuperblock) {
      // Modulo 2^32: partial results may leave int32 before the last term brings them back.
      const VU start = (VU)splat(-weight_offset * sums[m * runs]);
      const VU zero = (VU)splat(zeros[m * groups] - offset);
      const VF scale = splat(scales[m * groups]);
      VF sum[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const VU exact = load_words(acc + c * W) + start - column_sum[c] * zero;
        sum[c] = to_float((VI)exact) * (column_scale[c] * scale);
        if (!kFirst) sum[c] = load(y + c * W) + sum[c];
        if (!kLast) store(y + c * W, sum[c]);
      }
      if (kLast) {
        if (args.bias)
          for (int c = 0; c < 4; ++c) sum[c] = sum[c] + load(bias + c * W);
        if (direct) {
          uint16_t* to = static_cast<uint16_t*>(out(row + m));
          for (int c = 0; c < 4; ++c) store_bfloat(to + c * W, sum[c]);
        } else {
          for (int c = 0; c < 4; ++c) store(y + c * W, sum[c]);
          store_row(y, args.out_dtype, n, out(row + m));
        }
      }
    }
  }
};

}  // namespace
}  // namespace resq
