// The softmax of an item of the decode path: a chunk of keys of one kv head and its query rows.
#pragma once

#include "decode_query.h"
#include "lanes.h"
#include "prefetch.h"

namespace resq {
namespace {

// Operands and results of a pass. Rows of bytes: high bytes of all rows, then low bytes of all rows.
struct PassOperands {
  const int8_t* query;  // [2 rows, query_bytes]
  const QueryRow* row;  // [rows]
  float* score;         // [rows, kScoreStride], without the rows' units
  int8_t* weight[2];    // [2 rows, kRowStride], by part
};

// One chunk of keys of one kv head for one pass of query rows.
struct Item {
  bool valid = false;
  int64_t kv = 0, pass = 0, key = 0;
  Chunk chunk{};
};

template <int n>
struct Constant {
  static constexpr int value = n;
};

// f with n, 1 to 8, as a constant.
template <class F>
RESQ_INLINE void with_constant(int64_t n, const F& f) {
  switch (n) {
    case 1: return f(Constant<1>());
    case 2: return f(Constant<2>());
    case 3: return f(Constant<3>());
    case 4: return f(Constant<4>());
    case 5: return f(Constant<5>());
    case 6: return f(Constant<6>());
    case 7: return f(Constant<7>());
    default: return f(Constant<8>());
  }
}

// What a chunk adds to one row, and how much it shrinks what the row has.
struct ChunkFactors {
  float shrink, weight;
};

ChunkFactors advance_maximum(float chunk_max, float& row_max) {
  const float reference = max(chunk_max, row_max), step = min(chunk_max, row_max) - reference;
  const float smaller = _mm512_cvtss_f32(exp2_negative(_mm512_set1_ps(step)));
  const bool moved = chunk_max > row_max;
  row_max = reference;
  return moved ? ChunkFactors{smaller, 1.0f} : ChunkFactors{1.0f, smaller};
}

// Where a row's operands lie, and which keys of the item's chunk it sees.
struct RowView {
  RowOperands at;
  int64_t begin, end;
};

RowView row_view(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, const Item& item,
                 const PassOperands& n, int64_t r) {
  RowView view;
  view.at.score = n.score + r * kScoreStride;
  for (int part = 0; part < 2; ++part)
    for (int half = 0; half < 2; ++half)
      view.at.weight[part][half] = n.weight[part] + (half * shape.rows + r) * kRowStride;
  const int64_t query = task.queries == 1 ? 0 : (item.pass * shape.rows + r) / args.group;
  const int64_t position = task.position + query;
  view.begin = (args.window < 0 ? 0 : position - args.window + 1) - item.key;
  view.end = min(position + 1, task.key_end) - item.key;
  return view;
}

// Row by row, which keeps a row's scores in registers.
void softmax_rows(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, const Item& item,
                  const PassOperands& n, const ChunkScales& scales, int64_t count, RowSums* sums, float* row_max,
                  ChunkFactors* factors, Prefetch& prefetch) {
  with_constant(item.chunk.tokens / 16, [&](auto tiles) {
    for (int64_t r = 0; r < count; ++r) {
      const RowView v = row_view(args, task, shape, item, n, r);
      args.page.parts == 2 ? softmax_chunk<tiles.value, 2>(scales, n.row[r], v.at, v.begin, v.end, sums[r], prefetch)
                           : softmax_chunk<tiles.value, 1>(scales, n.row[r], v.at, v.begin, v.end, sums[r], prefetch);
      factors[r] = sums[r].seen ? advance_maximum(sums[r].highest, row_max[r]) : ChunkFactors{1.0f, 0.0f};
    }
  });
}

// advance_maximum for all rows of a pass.
void advance_maxima(const __m512 (&lanes)[kPassRows], const QueryRow* row, int64_t rows, RowSums* sums, float* row_max,
                    ChunkFactors* factors) {
  alignas(32) float unit[kPassRows] = {}, highest[kPassRows], shrink[kPassRows], weight[kPassRows];
  for (int64_t r = 0; r < rows; ++r) unit[r] = row[r].unit;
  const __mmask8 valid = static_cast<__mmask8>((1 << rows) - 1);
  const __m256 largest = reduce_rows(lanes), before = _mm256_maskz_loadu_ps(valid, row_max);
  const __mmask8 seen = _mm256_mask_cmp_ps_mask(valid, largest, _mm256_set1_ps(kLowest), _CMP_GT_OQ);
  const __m256 here = _mm256_mul_ps(largest, _mm256_load_ps(unit));
  const __m256 reference = _mm256_mask_max_ps(before, seen, here, before);
  const __m512 step = _mm512_castps256_ps512(_mm256_sub_ps(_mm256_min_ps(here, before), reference));
  const __m256 smaller = _mm512_castps512_ps256(exp2_negative(step)), one = _mm256_set1_ps(1.0f);
  const __mmask8 moved = _mm256_mask_cmp_ps_mask(seen, here, before, _CMP_GT_OQ);
  _mm256_mask_storeu_ps(row_max, valid, reference);
  _mm256_store_ps(highest, here);
  _mm256_store_ps(shrink, _mm256_mask_mov_ps(one, moved, smaller));
  _mm256_store_ps(weight, _mm256_mask_mov_ps(_mm256_maskz_mov_ps(seen, smaller), moved, one));
  for (int64_t r = 0; r < rows; ++r) {
    sums[r].highest = highest[r];
    sums[r].seen = seen >> r & 1;
    factors[r] = {shrink[r], weight[r]};
  }
}

// All rows' maxima first: with its own maximum before every row's exponentials, which alone fill Zen 4's scheduler, GQA 8
// took 1 to 4 % longer.
void softmax_together(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, const Item& item,
                      const PassOperands& n, const ChunkScales& scales, int64_t count, RowSums* sums, float* row_max,
                      ChunkFactors* factors, Prefetch& prefetch) {
  __m512 lanes[kPassRows];
  for (__m512& each : lanes) each = _mm512_set1_ps(kLowest);
  with_constant(item.chunk.tokens / 16, [&](auto tiles) {
    for (int64_t r = 0; r < count; ++r) {
      const RowView v = row_view(args, task, shape, item, n, r);
      find_highest<tiles.value>(v.at, v.begin, v.end, lanes[r], prefetch);
    }
    advance_maxima(lanes, n.row, shape.rows, sums, row_max, factors);
    for (int64_t r = 0; r < count; ++r) {
      const RowView v = row_view(args, task, shape, item, n, r);
      args.page.parts == 2 ? weigh_chunk<tiles.value, 2>(scales, n.row[r], v.at, v.begin, v.end, sums[r], prefetch)
                           : weigh_chunk<tiles.value, 1>(scales, n.row[r], v.at, v.begin, v.end, sums[r], prefetch);
    }
  });
}

}  // namespace
}  // namespace resq
