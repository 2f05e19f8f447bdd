// What every attention path does with rows: rotated queries in, normalised or partial results out, shares merged.
//
// A task's rows are ordered by kv head, then query token, then head of the group.
#pragma once

#include "exp.h"
#include "gemm_f32.h"
#include "convert.h"

namespace resq {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

RESQ_INLINE int64_t task_rows(const AttentionArgs& args, const AttentionTask& task) {
  return task.queries * args.group;  // of one kv head
}

// `count` query tokens from `query` on, for every head of the task, as float32 rows [token, kv_heads · group, head_dim]
// rotated by U_C. `scratch` is as large as `out`.
[[maybe_unused]] void load_rotated(const AttentionArgs& args, const AttentionTask& task, int64_t query, int64_t count,
                                   float* scratch, float* out) {
  const int64_t dim = args.page.head_dim, heads = task.kv_heads * args.group, rows = count * heads;
  float* plain = args.rotation ? scratch : out;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = task.query_row + query + r / heads, head = task.kv_head * args.group + r % heads;
    load_row(element(args.query, args.query_dtype, token * args.query_token_stride + head * args.query_head_stride),
             args.query_dtype, dim, plain + r * dim);
  }
  if (args.rotation) gemm_f32(rows, dim, dim, plain, dim, args.rotation, dim, out, dim, false);
}

// sum [attention_width]: padded low part, then the high part.
void write_row(const AttentionArgs& args, const float* sum, float denominator, int64_t token, int64_t head) {
  const PageLayout& p = args.page;
  alignas(64) float row[kMaxHeadDim + 64];
  // A row that sees no key (an empty sequence) is 0.
  const VF inverse = splat(1.0f / (denominator > 0.0f ? denominator : 1.0f));
  for (int64_t i = 0; i < p.low; i += W) store(row + i, load(sum + i) * inverse);
  for (int64_t i = 0; i < p.high; i += W) store(row + p.low + i, load(sum + p.low_padded + i) * inverse);
  store_row(row, args.out_dtype, p.head_dim,
            element(args.out, args.out_dtype, token * args.out_token_stride + head * args.out_head_stride));
}

// Row r of the task's kv head number `kv`: to the share's partial result, or to `out`. row_max in natural units.
void finish_row(const AttentionArgs& args, const AttentionTask& task, int64_t kv, int64_t r, const float* sum,
                float row_max, float denominator) {
  const int64_t width = attention_width(args.page);
  if (task.partial_sum) {
    const int64_t row = kv * task_rows(args, task) + r;
    __builtin_memcpy(task.partial_sum + row * width, sum, static_cast<size_t>(width) * 4);
    task.partial_max[row] = row_max;
    task.partial_denominator[row] = denominator;
  } else {
    write_row(args, sum, denominator, task.query_row + r / args.group,
              (task.kv_head + kv) * args.group + r % args.group);
  }
}

// Σ_i e^{m_i − m} · sum_i and the same of the denominators, over the shares of one context.
[[maybe_unused]] void merge_shares(const AttentionArgs& args, const AttentionMerge& merge) {
  const AttentionTask& first = merge.shares[0];
  const int64_t rows = task_rows(args, first), width = attention_width(args.page);
  alignas(64) float sum[kMaxHeadDim + 64];
  for (int64_t row = 0; row < rows * first.kv_heads; ++row) {
    float row_max = kNegativeInfinity;
    for (int64_t i = 0; i < merge.count; ++i) row_max = max(row_max, merge.shares[i].partial_max[row]);
    float denominator = 0.0f;
    for (int64_t c = 0; c < width; c += W) store(sum + c, VF{});
    for (int64_t i = 0; i < merge.count; ++i) {
      const AttentionTask& share = merge.shares[i];
      if (share.partial_max[row] == kNegativeInfinity) continue;
      const float weight = exp_negative(splat(share.partial_max[row] - row_max))[0];
      denominator += weight * share.partial_denominator[row];
      const float* from = share.partial_sum + row * width;
      for (int64_t c = 0; c < width; c += W) store(sum + c, fma(splat(weight), load(from + c), load(sum + c)));
    }
    write_row(args, sum, denominator, first.query_row + row % rows / args.group,
              (first.kv_head + row / rows) * args.group + row % args.group);
  }
}

}  // namespace
}  // namespace resq
