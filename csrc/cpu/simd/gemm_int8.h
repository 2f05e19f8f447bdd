// The integer GEMM of one superblock (64 output columns) and its float32 epilogue; the ISA supplies the micro-kernels.
//
// The weight is the unsigned operand u = w + 8 (nibbles) or w + 128 (bytes), the activation the signed one a = q − o
// (o = 128 for 8-bit groups). With Σ over a run's columns,
//   I = Σ q·w − z·Σw = Σ a·u − offset_w·Σa − (z − o)·Σw:
// two scalars of the token and the weight's column sums turn the raw product into the exact I, modulo 2^32 all along.
// The float part, float(I)·(s_x·s_w) summed in run order without fusing, equals resq_vllm.reference.linear bit for bit.
#pragma once

#if defined(RESQ_TU_AVX512)
#include "micro_avx512.h"
#elif defined(RESQ_TU_AVX2)
#include "micro_avx2.h"
#else
#include "micro_portable.h"
#endif
#include "quantize.h"

namespace resq {
namespace {

template <int MR, int S>
void micro_run(const RunPlace& run, int32_t act_bits, const uint8_t* w, int64_t stride, const int8_t* a, int64_t lda,
               int32_t* acc) {
  if constexpr (S > 1) {
    if (run.nibbles) {
      micro_nibbles<MR, S>(w, a, lda, run.padded / 8, acc, stride);
    } else {
      micro_bytes<MR, false, S>(w, a, lda, run.padded / 4, acc, stride);
    }
  } else if (run.nibbles) {
    micro_nibbles<MR>(w, a, lda, run.padded / 8, acc);
  } else if (act_bits == 4) {
    micro_bytes<MR, true>(w, a, lda, run.padded / 4, acc);
  } else {
    micro_bytes<MR, false>(w, a, lda, run.padded / 4, acc);
  }
}

// y[0:n] (+)= float(I)·(s_x·s_w) of one token and run.
RESQ_INLINE void accumulate_run(const int32_t* acc, const int32_t* weight_sum, const float* weight_scale, int64_t n,
                                int32_t start, int32_t zero, float scale, bool first, float* y) {
  // Unsigned, because partial results may leave int32 before the last term brings them back.
  const uint32_t from = static_cast<uint32_t>(start), factor = static_cast<uint32_t>(zero);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const VU exact = load_words(acc + j) + from - load_words(weight_sum + j) * factor;
    const VF term = to_float((VI)exact) * (load(weight_scale + j) * scale);
    store(y + j, first ? term : load(y + j) + term);
  }
  for (; j < n; ++j) {
    const uint32_t exact = static_cast<uint32_t>(acc[j]) + from - static_cast<uint32_t>(weight_sum[j]) * factor;
    const float term = static_cast<float>(static_cast<int32_t>(exact)) * (scale * weight_scale[j]);
    y[j] = first ? term : y[j] + term;
  }
}

// Asks for n words that the epilogue of a product will read.
RESQ_INLINE void fetch_words(const void* p, int64_t n) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(at + 4 * i);
}

// MR rows from `row` on with S superblocks, whose n outputs begin at `column`.
template <int MR, int S>
void linear_rows(const LinearArgs& args, const uint8_t* weights, int64_t column, int64_t n, const float* bias,
                 int64_t row) {
  constexpr int64_t width = S * kSuperblock;
  alignas(64) int32_t acc[MR * width];
  alignas(64) float y[MR * width];
  const PlanView& plan = args.plan;
  for (int64_t r = 0; r < plan.n_runs; ++r) {
    const RunPlace& run = plan.runs[r];
    const int32_t bits = plan.group_bits[run.group];
    const float* weight_scale = args.weight_scale + run.scale_row * args.n + column;
    const int32_t* weight_sum = args.weight_sum + r * args.n + column;
    fetch_words(weight_scale, n);
    fetch_words(weight_sum, n);
    micro_run<MR, S>(run, bits, weights + run.weight_at, plan.superblock_bytes,
                     args.codes + row * args.code_stride + run.activation_at, args.code_stride, acc);
    const int32_t weight_offset = run.nibbles ? 8 : 128;
    for (int64_t m = 0; m < MR; ++m) {
      const int64_t at = (row + m) * plan.n_groups + run.group;
      const int32_t start = -weight_offset * args.sums[(row + m) * plan.n_runs + r];
      const int32_t zero = args.zero[at] - code_offset(bits);
      accumulate_run(acc + m * width, weight_sum, weight_scale, n, start, zero, args.scale[at], r == 0, y + m * width);
    }
  }
  for (int64_t m = 0; m < MR; ++m) {
    float* sum = y + m * width;
    if (bias)
      for (int64_t j = 0; j < n; ++j) sum[j] += bias[j];
    store_row(sum, args.out_dtype, n, element(args.out, args.out_dtype, (row + m) * args.out_stride + column));
  }
}

// Rows [begin, end) with S superblocks side by side; only few rows take more than one.
template <int S>
void linear_abreast(const LinearArgs& args, int64_t superblock, int64_t begin, int64_t end) {
  const uint8_t* weights = args.packed + superblock * args.plan.superblock_bytes;
  const int64_t column = superblock * kSuperblock, n = min(S * kSuperblock, args.n - column);
  float bias_values[S * kSuperblock];
  const float* bias = nullptr;
  if (args.bias) {
    load_row(element(args.bias, args.bias_dtype, column), args.bias_dtype, n, bias_values);
    bias = bias_values;
  }
  const auto rows_from = [&]<int MR>(int64_t row) {
    if constexpr (S <= kAbreast<MR>) linear_rows<MR, S>(args, weights, column, n, bias, row);
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
int64_t abreast(int64_t rows) {
  switch (rows) {
    case 1: return kAbreast<1>;
    case 2: return kAbreast<2>;
    case 3: return kAbreast<3>;
    default: return 1;
  }
}

void linear_superblocks(const LinearArgs& args, int64_t superblock, int64_t superblock_end, int64_t begin,
                        int64_t end) {
  const int64_t most = abreast(end - begin);
  while (superblock < superblock_end) {
    const int64_t count = min(most, superblock_end - superblock);
    if (count >= 4) {
      linear_abreast<4>(args, superblock, begin, end);
      superblock += 4;
    } else if (count >= 2) {
      linear_abreast<2>(args, superblock, begin, end);
      superblock += 2;
    } else {
      linear_abreast<1>(args, superblock++, begin, end);
    }
  }
}

}  // namespace
}  // namespace resq
