// Attention of many query rows over packed pages with vpdpwssd, for processors without AMX.
//
// q and P times V's scale are int16 relative to their largest of a row (and block of keys): next to bfloat16's 8 bits
// that is finer wherever it matters, and on codes the products are exact. A block of keys and values is unpacked once
// for all query rows of the task; rows are taken 48 at a time through scores, softmax and values, in the L1 and L2 cache.
#pragma once

#include "prefill_int16_query.h"
#include "prefill_int16_softmax.h"

namespace resq {
namespace {

constexpr int64_t kPrefetchOutput = 16;  // rows ahead of the one that is written

struct Int16Buffers {
  int16_t* query;     // [rows, query_words]
  float *row_scale, *row_max;
  float* denominator;  // [rows, 16], lanes to be added
  float* sum;          // [rows, width]
  uint8_t* turning;    // of load_int16_rows
  Int16Block block;
  Int16Panel* panel;
};

// Rows [first, first + count) of the task against the block of keys from `key` on.
void attend_panel(const AttentionArgs& args, const AttentionTask& task, const Int16Shape& s, int64_t key, int64_t first,
                  int64_t count, const Int16Buffers& b) {
  Int16Panel& panel = *b.panel;
  const int64_t all_rows = task_rows(args, task), groups = count / kRowGroup;
  int64_t most = 0;
  bool masked[kPanelGroups];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = first + g * kRowGroup, last_row = min(row + kRowGroup, all_rows) - 1;
    const int64_t earliest = task.position + row / args.group, latest = task.position + last_row / args.group;
    const auto oldest = [&](int64_t position) { return args.window < 0 ? -key : position - args.window + 1 - key; };
    const auto end = [&](int64_t position) { return min(position + 1, task.key_end) - key; };
    const bool sees = oldest(earliest) < kInt16Keys && end(latest) > 0;
    panel.keys[g] = sees ? min(round_up(end(latest), 32), kInt16Keys) : 0;
    masked[g] = oldest(latest) > 0 || end(earliest) < panel.keys[g];
    most = max(most, panel.keys[g]);
    for (int64_t r = 0; sees && masked[g] && r < kRowGroup; ++r) {
      const int64_t position = task.position + min(row + r, all_rows - 1) / args.group;
      panel.seen_begin[g * kRowGroup + r] = static_cast<int32_t>(max(oldest(position), int64_t{0}));
      panel.seen_end[g * kRowGroup + r] = static_cast<int32_t>(min(end(position), kInt16Keys));
    }
  }
  if (!most) return;
  const __m512 unseen = _mm512_set1_ps(kUnseenKey);
  for (int64_t r = 0; r < round_up(count, 16); ++r) _mm512_store_ps(panel.highest + 16 * r, unseen);
  // A strip of 64 keys stays in the L1 cache for all rows.
  for (int64_t strip = 0; strip < most; strip += 64) {
    for (int64_t g = 0; g < groups; ++g) {
      if (panel.keys[g] <= strip) continue;
      const ScoreRows x{b.query + first * s.query_words, b.row_scale + first, strip};
      const bool wide = panel.keys[g] - strip >= 64;
      for (int64_t r = g * kRowGroup; r < (g + 1) * kRowGroup; r += kDotRows)
        (masked[g] ? wide ? score_rows<4, true> : score_rows<2, true>
                   : wide ? score_rows<4, false> : score_rows<2, false>)(s, b.block, x, r, panel);
    }
  }
  relate_rows(count, b.row_max + first, panel);
  for (int64_t g = 0; g < groups; ++g) {
    if (!panel.keys[g]) continue;
    for (int64_t r = g * kRowGroup; r < (g + 1) * kRowGroup; ++r)
      (masked[g] ? weigh_row<true> : weigh_row<false>)(*b.block.scales, panel.keys[g], r,
                                                       b.denominator + (first + r) * 16, panel);
  }
  const auto add = [&](const int16_t* weight, int64_t tile, int64_t tiles, float unit) {
    for (int64_t g = 0; g < groups; ++g) {
      if (!panel.keys[g]) continue;
      const int64_t row = g * kRowGroup;
      float* sum = b.sum + (first + row) * s.width + 16 * tile;
      product(kRowGroup, weight + row * kInt16Keys, kInt16Keys, b.block.value + tile * s.value_bytes, s.value_bytes,
              tiles, panel.keys[g] / 2, [&](int64_t r, int64_t t, __m512i sums) {
                float* to = sum + r * s.width + 16 * t;
                const __m512 kept = _mm512_mul_ps(_mm512_load_ps(to), _mm512_set1_ps(panel.shrink[row + r]));
                _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums),
                                                    _mm512_set1_ps(panel.unit[row + r] * unit), kept));
              });
    }
  };
  add(panel.low_weight, 0, s.low_tiles, 1.0f);
  if (s.high_tiles) add(panel.high_weight, s.low_tiles, s.high_tiles, b.block.scales->largest_ratio);
}

void attend_int16_head(const AttentionArgs& args, const AttentionTask& task, const Int16Shape& s, int64_t padded,
                       const Int16Buffers& b) {
  const PageLayout& p = args.page;
  const int32_t* blocks = args.block_table + task.sequence * args.block_table_stride;
  for (int64_t key = task.key_begin; key < task.key_end; key += kInt16Keys) {
    const int64_t tiles = min(kInt16Keys, round_up(task.key_end - key, 32)) / 16;
    for (int64_t t = 0; t < tiles; ++t) {
      // Beyond the end the last tile stands in, and no row sees it.
      const int64_t at = min(key + 16 * t, (task.key_end - 1) / 16 * 16);
      const uint8_t* page = args.cache + blocks[at / p.tokens] * args.block_stride + task.kv_head * args.head_stride;
      unpack_words(p, s, {page, at % p.tokens, task.key_end - key - 16 * t}, t, b.block);
    }
    relate_ratios(tiles, *b.block.scales);
    for (int64_t first = 0; first < padded; first += kInt16Rows)
      attend_panel(args, task, s, key, first, min(padded - first, kInt16Rows), b);
  }
}

RESQ_INLINE uint16_t* output_row(const AttentionArgs& args, const AttentionTask& task, int64_t kv, int64_t r) {
  const int64_t token = task.query_row + r / args.group, head = (task.kv_head + kv) * args.group + r % args.group;
  return static_cast<uint16_t*>(
      element(args.out, args.out_dtype, token * args.out_token_stride + head * args.out_head_stride));
}

// finish_row with the maximum in powers of 2. Whole heads of bfloat16 go straight to `out`.
void finish_int16(const AttentionArgs& args, const AttentionTask& task, const Int16Shape& s, int64_t kv, int64_t r,
                  const float* sum, float row_max, float denominator) {
  const PageLayout& p = args.page;
  const float* high = sum + 16 * s.low_tiles;
  if (task.partial_sum || args.out_dtype != DType::bf16 || p.low != p.low_padded) {
    alignas(64) float row[kMaxHeadDim + 64] = {};
    __builtin_memcpy(row, sum, static_cast<size_t>(p.low_padded) * 4);
    __builtin_memcpy(row + p.low_padded, high, static_cast<size_t>(p.high_padded) * 4);
    finish_row(args, task, kv, r, row, row_max > kUnseenKey ? row_max * kLn2 : kNegativeInfinity, denominator);
    return;
  }
  uint16_t* out = output_row(args, task, kv, r);
  const VF inverse = splat(1.0f / (denominator > 0.0f ? denominator : 1.0f));
  const auto put = [&](const float* from, int64_t dims, uint16_t* to) {
    for (int64_t i = 0; i < dims; i += 16)
      _mm256_mask_storeu_epi16(to + i, columns_in(0, 0, dims - i),
                               _mm512_cvtepi32_epi16((__m512i)(bfloat_words(load(from + i) * inverse) >> 16)));
  };
  put(sum, p.low, out);
  put(high, p.high, out + p.low);
}

void prefill_int16(const AttentionArgs& args, const AttentionTask& task) {
  const PageLayout& p = args.page;
  const Int16Shape s = int16_shape(p);
  const int64_t rows = task_rows(args, task), padded = round_up(rows, kRowGroup);
  uint8_t* next = nullptr;
  const auto take = [&](int64_t bytes) {
    uint8_t* taken = next;
    next += round_up(bytes, 64);
    return taken;
  };
  Int16Buffers b{};
  // Once to measure, once to place.
  for (int round = 0; round < 2; ++round) {
    if (round) next = static_cast<uint8_t*>(thread_scratch(Slot::attention, reinterpret_cast<intptr_t>(next)));
    b.query = reinterpret_cast<int16_t*>(take(padded * s.query_words * 2));
    b.row_scale = reinterpret_cast<float*>(take(padded * 4));
    b.row_max = reinterpret_cast<float*>(take((padded + 16) * 4));
    b.denominator = reinterpret_cast<float*>(take(padded * 64));
    b.sum = reinterpret_cast<float*>(take(padded * s.width * 4));
    b.turning = take(kTurnedRows * (4 * turn_pairs(p) + s.query_words * 4));
    b.block.key = take(kInt16Keys / 16 * s.key_bytes);
    b.block.value = take((s.low_tiles + s.high_tiles) * s.value_bytes);
    b.block.scales = reinterpret_cast<Int16Scales*>(take(sizeof(Int16Scales)));
    b.panel = reinterpret_cast<Int16Panel*>(take(sizeof(Int16Panel)));
  }
  for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
    AttentionTask one = task;
    one.kv_head += kv;
    one.kv_heads = 1;
    load_int16_rows(args, one, s, padded, b.turning, b.query, b.row_scale);
    __builtin_memset(b.denominator, 0, static_cast<size_t>(padded) * 64);
    __builtin_memset(b.sum, 0, static_cast<size_t>(padded * s.width) * 4);
    for (int64_t r = 0; r < padded + 16; ++r) b.row_max[r] = kUnseenKey;
    attend_int16_head(args, one, s, padded, b);
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* later = output_row(args, task, kv, min(r + kPrefetchOutput, rows - 1));
      for (int64_t i = 0; i < p.head_dim; i += 32) __builtin_prefetch(later + i, 1);
      finish_int16(args, task, s, kv, r, b.sum + r * s.width, b.row_max[r],
                   _mm512_reduce_add_ps(_mm512_load_ps(b.denominator + 16 * r)));
    }
  }
}

}  // namespace
}  // namespace resq
