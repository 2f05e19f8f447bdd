// The integer GEMM of one superblock (64 output columns) and its float32 epilogue; the ISA supplies the micro-kernels.
//
// The weight is the unsigned operand u = w + 8 (nibbles) or w + 128 (bytes), the activation the signed one a = q − o
// (o = 128 for 8-bit groups). With Σ over a run's columns,
//   I = Σ q·w − z·Σw = Σ a·u − offset_w·Σa − (z − o)·Σw:
// two scalars of the token and the weight's column sums turn the raw product into the exact I, modulo 2^32 all along.
// The float part, float(I)·(s_x·s_w) summed in run order without fusing, equals resq_vllm.reference.linear bit for bit.
#pragma once

#include "output.h"
#include "quantize.h"
#include "run_products.h"

namespace resq {
namespace {

// Asks for n words that the epilogue of a product will read.
RESQ_INLINE void fetch_words(const void* p, int64_t n) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(at + 4 * i);
}

// MR rows from `row` on with S superblocks, whose n outputs begin at `column`.
template <Reading R, int MR, int S>
void linear_rows(const LinearArgs& args, const uint8_t* weights, int64_t column, int64_t n, const float* bias,
                 int64_t row, Ahead& next) {
  constexpr int64_t width = S * kSuperblock;
  alignas(64) float y[MR * width];
  RunTerms<MR> terms;
  terms.n = n;
  terms.y = y;
  const PlanView& plan = args.plan;
  const bool around = around_caches(args);
  for (int64_t r = 0; r < plan.n_runs; ++r) {
    const RunPlace& run = plan.runs[r];
    const int32_t bits = plan.group_bits[run.group];
    terms.weight_scale = args.weight_scale + run.scale_row * args.n + column;
    terms.weight_sum = args.weight_sum + r * args.n + column;
    fetch_words(terms.weight_scale, n);
    fetch_words(terms.weight_sum, n);
    const int32_t weight_offset = run.nibbles ? 8 : 128;
    for (int64_t m = 0; m < MR; ++m) {
      const int64_t at = (row + m) * plan.n_groups + run.group;
      terms.start[m] = static_cast<uint32_t>(-weight_offset * args.sums[(row + m) * plan.n_runs + r]);
      terms.zero[m] = static_cast<uint32_t>(args.zero[at] - code_offset(bits));
      terms.scale[m] = args.scale[at];
    }
    terms.first = r == 0;
    add_run<R, MR, S>(run, bits, weights + run.weight_at, plan.superblock_bytes,
                   args.codes + row * args.code_stride + run.activation_at, args.code_stride, terms, next);
  }
  for (int64_t m = 0; m < MR; ++m) {
    float* sum = y + m * width;
    if (bias)
      for (int64_t j = 0; j < n; ++j) sum[j] += bias[j];
    write_row(args, around, row + m, column, n, sum);
  }
}

// Rows [begin, end) with S superblocks side by side; only few rows take more than one.
template <Reading R, int S>
void linear_abreast(const LinearArgs& args, int64_t superblock, int64_t begin, int64_t end) {
  const uint8_t* weights = args.packed + superblock * args.plan.superblock_bytes;
  const int64_t column = superblock * kSuperblock, n = min(S * kSuperblock, args.n - column);
  float bias_values[S * kSuperblock];
  const float* bias = nullptr;
  if (args.bias) {
    load_row(element(args.bias, args.bias_dtype, column), args.bias_dtype, n, bias_values);
    bias = bias_values;
  }
  Ahead next = ahead_of(args, superblock, end - begin);
  const auto rows_from = [&]<int MR>(int64_t row) {
    if constexpr (S <= kAbreast<R, MR>) linear_rows<R, MR, S>(args, weights, column, n, bias, row, next);
  };
  for (int64_t row = begin; row < end;) {
    const int64_t blocks = (end - row + kMicroRows - 1) / kMicroRows;
    const int64_t rows = (end - row + blocks - 1) / blocks;
    switch (rows) {
      case 1: rows_from.template operator()<1>(row); break;
      case 2: rows_from.template operator()<2>(row); break;
      case 3: rows_from.template operator()<3>(row); break;
      case 4: rows_from.template operator()<4>(row); break;
      case 5: rows_from.template operator()<5>(row); break;
      default: rows_from.template operator()<6>(row); break;
    }
    row += rows;
  }
}

// Fewer rows at a time would unpack the weights too often.
constexpr int64_t kLeastPanelRows = 128;

// Superblocks side by side for so many rows.
template <Reading R>
int64_t abreast(int64_t rows) {
  switch (rows) {
    case 1: return kAbreast<R, 1>;
    case 2: return kAbreast<R, 2>;
    case 3: return kAbreast<R, 3>;
    default: return 1;
  }
}

template <Reading R>
void linear_superblocks(const LinearArgs& args, int64_t superblock, int64_t superblock_end, int64_t begin,
                        int64_t end) {
  const int64_t most = abreast<R>(end - begin);
  while (superblock < superblock_end) {
    const int64_t count = min(most, superblock_end - superblock);
    if (count >= 4) {
      linear_abreast<R, 4>(args, superblock, begin, end);
      superblock += 4;
    } else if (count >= 2) {
      linear_abreast<R, 2>(args, superblock, begin, end);
      superblock += 2;
    } else {
      linear_abreast<R, 1>(args, superblock++, begin, end);
    }
  }
  finish_writes(around_caches(args));
}

}  // namespace
}  // namespace resq
