// Causal attention of a tile of queries over packed pages: online softmax, all in float32.
//
// The path for every layout, dtype and instruction set; decode.h and prefill.h are the faster ones. The query heads of
// a kv head share every unpacked tile. Long contexts may be cut into shares whose unnormalised results are merged.
#pragma once

#include "attention_rows.h"
#include "kv_unpack.h"

namespace resq {
namespace {

constexpr int64_t kKeyTile = 32;  // K̂ᵀ and V̂ of a tile stay in the L1 cache up to a head_dim of 128

struct AttentionBuffers {
  float *query, *scores, *sum, *row_max, *denominator, *key, *value;
};

// Query rows in float32, rotated, scaled and in the order of the unpacked K. A task here has one kv head.
void load_queries(const AttentionArgs& args, const AttentionTask& task, const AttentionBuffers& b) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), dim = p.head_dim, width = p.low_padded + p.high_padded;
  float* plain = b.sum;  // free until the first tile; at least as wide as a head
  load_rotated(args, task, 0, task.queries, b.query, plain);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = plain + r * dim;
    float* to = b.query + r * width;
    for (int64_t i = 0; i < width; ++i) to[i] = 0.0f;
    for (int64_t i = 0; i < p.low; ++i) to[i] = from[i] * args.scale;
    for (int64_t i = 0; i < p.high; ++i) to[p.low_padded + i] = from[p.low + i] * args.scale;
  }
}

void unpack_tile(const AttentionArgs& args, const AttentionTask& task, int64_t key, int64_t end, int64_t value_stride,
                 const AttentionBuffers& b) {
  const PageLayout& p = args.page;
  const int32_t* blocks = args.block_table + task.sequence * args.block_table_stride;
  for (int64_t t = 0; t < kKeyTile; t += kTokenTile) {
    float* to_key = b.key + t;
    float* to_value = b.value + t * value_stride;
    if (key + t >= end) {  // nothing was stored there: zeros, so that P = 0 gives 0
      for (int64_t i = 0; i < p.low_padded + p.high_padded; ++i)
        __builtin_memset(to_key + i * kKeyTile, 0, kTokenTile * 4);
      __builtin_memset(to_value, 0, static_cast<size_t>(kTokenTile * value_stride) * 4);
      continue;
    }
    const uint8_t* page =
        args.cache + blocks[(key + t) / p.tokens] * args.block_stride + task.kv_head * args.head_stride;
    const int64_t token = (key + t) % p.tokens, valid = end - key - t;
    unpack_key(p, page, token, valid, to_key, kKeyTile);
    unpack_value(p, page, token, valid, to_value, value_stride);
  }
}

// Scores of one row -> probabilities relative to the running maximum; rescales the row's sum when that moves.
void softmax_row(float* scores, int64_t visible_begin, int64_t visible_end, float& row_max, float& denominator,
                 float* sum, int64_t width) {
  if (visible_begin > 0 || visible_end < kKeyTile)
    for (int64_t i = 0; i < kKeyTile; ++i)
      if (i < visible_begin || i >= visible_end) scores[i] = kNegativeInfinity;
  VF highest = load(scores);
  for (int64_t i = W; i < kKeyTile; i += W) highest = max(highest, load(scores + i));
  const float tile_max = reduce_max(highest);
  if (tile_max == kNegativeInfinity) {
    for (int64_t i = 0; i < kKeyTile; ++i) scores[i] = 0.0f;
    return;
  }
  if (tile_max > row_max) {
    const float shrink = row_max == kNegativeInfinity ? 0.0f : exp_negative(splat(row_max - tile_max))[0];
    denominator *= shrink;
    for (int64_t i = 0; i < width; i += W) store(sum + i, load(sum + i) * shrink);
    row_max = tile_max;
  }
  VF total = VF{};
  for (int64_t i = 0; i < kKeyTile; i += W) {
    const VF p = exp_negative(load(scores + i) - row_max);
    store(scores + i, p);
    total += p;
  }
  denominator += reduce_add(total);
}

void attention_tile(const AttentionArgs& args, const AttentionTask& task) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), width = attention_width(p);
  const int64_t dims = p.low_padded + p.high_padded, value_stride = width + 16;
  const int64_t floats = rows * (dims + p.head_dim) + rows * (kKeyTile + width + 2) + kKeyTile * (dims + value_stride);
  float* at = static_cast<float*>(thread_scratch(Slot::attention, (floats + 8 * 16) * 4));
  const auto take = [&](int64_t n) {
    float* taken = at;
    at += round_up(n, 16);
    return taken;
  };
  AttentionBuffers b;
  b.key = take(kKeyTile * dims);
  b.value = take(kKeyTile * value_stride);
  b.scores = take(rows * kKeyTile);
  b.sum = take(rows * width);
  b.query = take(rows * max(dims, p.head_dim));
  b.row_max = take(rows);
  b.denominator = take(rows);

  load_queries(args, task, b);
  for (int64_t i = 0; i < rows * width; ++i) b.sum[i] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) b.row_max[r] = kNegativeInfinity, b.denominator[r] = 0.0f;

  for (int64_t key = task.key_begin; key < task.key_end; key += kKeyTile) {
    unpack_tile(args, task, key, task.key_end, value_stride, b);
    gemm_f32_stretches(rows, kKeyTile, dims, b.query, dims, b.key, kKeyTile, b.scores, kKeyTile, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = task.position + r / args.group;
      const int64_t first = args.window < 0 ? 0 : position - args.window + 1;
      softmax_row(b.scores + r * kKeyTile, first - key, min(position + 1, task.key_end) - key, b.row_max[r],
                  b.denominator[r], b.sum + r * width, width);
    }
    gemm_f32_stretches(rows, width, kKeyTile, b.scores, kKeyTile, b.value, value_stride, b.sum, width, true);
  }

  for (int64_t r = 0; r < rows; ++r) finish_row(args, task, 0, r, b.sum + r * width, b.row_max[r], b.denominator[r]);
}

// Every kv head of the task.
void attention_float(const AttentionArgs& args, const AttentionTask& task) {
  const int64_t rows = task_rows(args, task);
  for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
    AttentionTask one = task;
    one.kv_head += kv;
    one.kv_heads = 1;
    if (task.partial_sum) {
      one.partial_sum += kv * rows * attention_width(args.page);
      one.partial_max += kv * rows;
      one.partial_denominator += kv * rows;
    }
    attention_tile(args, one);
  }
}

}  // namespace
}  // namespace resq
