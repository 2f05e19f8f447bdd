// Attention of many query rows over packed pages in bfloat16, with float32 scores and sums.
//
// A block of keys and values is unpacked once for all query rows of the task (prefill_unpack.h); rows are taken 32 at a
// time. q and P·scale are rounded to bfloat16; codes, scales and zero points are not. `Products` multiplies: on AMX
// tiles or with vdpbf16ps.
#pragma once

#include "exp2.h"
#include "prefill_query.h"

namespace resq {
namespace {

constexpr float kUnseen = -3e38f;

struct PrefillBuffers {
  uint16_t* query;      // bfloat16 [rows, dims]
  uint16_t* weight[2];  // bfloat16 [32, kBlockKeys]: of the panel in softmax, and of the one before
  float* score[2][2];   // [32, kBlockKeys] by part: of the panel in softmax, and of the one after
  float *sum, *row_max, *denominator;
  PrefillBlock block;
  uint8_t* turning;          // of load_panels
};

// Scores of a row -> probabilities times V's low scale, in bfloat16. Rescales the row's sum when the maximum moves.
template <int N, int kParts>
void softmax_panel_row(const BlockScales& s, const float* low, const float* high, int64_t begin, int64_t end,
                       float& row_max, float& denominator, float* sum, int64_t width, uint16_t* weight) {
  __m512 score[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    score[i] = _mm512_mul_ps(_mm512_load_ps(low + 16 * i), _mm512_load_ps(s.key[0] + 16 * i));
    if constexpr (kParts == 2)
      score[i] = _mm512_fmadd_ps(_mm512_load_ps(high + 16 * i), _mm512_load_ps(s.key[1] + 16 * i), score[i]);
  }
  if (begin > 0 || end < 16 * N) {
    const __m512i first = key_bound(begin, kBlockKeys), last = key_bound(end, kBlockKeys);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kUnseen), keys_seen(16 * i, first, last), score[i]);
  }
  __m512 highest = score[0];
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) highest = _mm512_max_ps(highest, score[i]);
  const float block_max = _mm512_reduce_max_ps(highest);
  if (block_max <= kUnseen) {
    for (int i = 0; i < N; i += 2) _mm512_store_si512(weight + 16 * i, _mm512_setzero_si512());
    return;
  }
  if (block_max > row_max) {
    const __m512 shrink = exp2_negative(_mm512_set1_ps(row_max - block_max));
    denominator *= _mm512_cvtss_f32(shrink);
    for (int64_t i = 0; i < width; i += 16) _mm512_store_ps(sum + i, _mm512_mul_ps(_mm512_load_ps(sum + i), shrink));
    row_max = block_max;
  }
  const __m512 reference = _mm512_set1_ps(row_max);
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 2) {
    const __m512 a = exp2_negative(_mm512_sub_ps(score[i], reference));
    const __m512 b = exp2_negative(_mm512_sub_ps(score[i + 1], reference));
    total = _mm512_add_ps(total, _mm512_add_ps(a, b));
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_mul_ps(b, _mm512_load_ps(s.value + 16 * (i + 1))),
                                               _mm512_mul_ps(a, _mm512_load_ps(s.value + 16 * i)));
    _mm512_store_si512(weight + 16 * i, (__m512i)pairs);
  }
  denominator += _mm512_reduce_add_ps(total);
}

using RowSoftmax = decltype(&softmax_panel_row<2, 1>);

// For the first `keys` keys of a block, a multiple of 32.
template <int kParts>
RowSoftmax row_softmax(int64_t keys) {
  static_assert(kBlockKeys == 128);
  static constexpr RowSoftmax list[] = {softmax_panel_row<2, kParts>, softmax_panel_row<4, kParts>,
                                        softmax_panel_row<6, kParts>, softmax_panel_row<8, kParts>};
  return list[keys / 32 - 1];
}

// Blocks of products that wait to be done beside the softmax.
template <class Products>
class Waiting {
 public:
  void push(const Product& product, bool add) {
    product_[products_] = product;
    for (int64_t t = 0; t < product.tiles; t += 2) block_[blocks_++] = {products_, t, add};
    ++products_;
  }
  // As many as a share of part/whole of them is.
  void advance(int64_t part, int64_t whole) {
    for (; done_ * whole < blocks_ * part; ++done_) {
      const Block& b = block_[done_];
      Products::block(product_[b.product], b.tile, b.add);
    }
  }

 private:
  struct Block {
    int64_t product, tile;
    bool add;
  };
  Product product_[3];
  Block block_[2 * kBlockKeys / 32 + kMaxHeadDim / 16 + 2];
  int64_t products_ = 0, blocks_ = 0, done_ = 0;
};

// Panels [begin, end) of rows against one block of keys. Three panels are on their way at any time: while the vector
// ports are busy with the softmax of one, the tile unit forms the scores of the next and the output of the one before.
template <class Products>
void attend_block(const AttentionArgs& args, const AttentionTask& task, const PrefillShape& s, int64_t key,
                  int64_t begin, int64_t end, const PrefillBuffers& b) {
  const int64_t all_rows = task_rows(args, task);
  const auto position = [&](int64_t row) { return task.position + row / args.group; };
  // Keys of the block that a panel may see, in whole steps of the products.
  const auto keys_of = [&](int64_t panel) {
    const int64_t last = position(min((panel + 1) * kPanelRows, all_rows) - 1);
    return round_up(min(min(last + 1, task.key_end) - key, kBlockKeys), 32);
  };
  const auto push_scores = [&](int64_t panel, Waiting<Products>& waiting) {
    const uint16_t* query = b.query + panel * kPanelRows * s.dims;
    Product x{query, s.dims * 2, s.low_dims / 32, b.block.key, s.key_bytes, keys_of(panel) / 16, b.score[panel % 2][0],
              kBlockKeys};
    waiting.push(x, false);
    if (!s.high_dims) return;
    x.a += s.low_dims;
    x.b += s.low_dims / 2 * 64;
    x.steps = s.high_dims / 32;
    x.c = b.score[panel % 2][1];
    waiting.push(x, false);
  };
  for (int64_t panel = begin - 1; panel <= end; ++panel) {
    Waiting<Products> waiting;
    if (panel + 1 < end) push_scores(panel + 1, waiting);
    if (panel > begin)
      waiting.push({b.weight[(panel - 1) % 2], kBlockKeys * 2, keys_of(panel - 1) / 32, b.block.value, s.value_bytes,
                    s.tiles, b.sum + (panel - 1) * kPanelRows * s.width, s.width}, true);
    Products::fence();
    if (begin <= panel && panel < end) {
      const int64_t first = panel * kPanelRows, rows = min(kPanelRows, all_rows - first), keys = keys_of(panel);
      const RowSoftmax softmax = args.page.parts == 2 ? row_softmax<2>(keys) : row_softmax<1>(keys);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        const int64_t oldest = args.window < 0 ? 0 : position(row) - args.window + 1;
        softmax(*b.block.scales, b.score[panel % 2][0] + r * kBlockKeys, b.score[panel % 2][1] + r * kBlockKeys,
                oldest - key, min(position(row) + 1, task.key_end) - key, b.row_max[row], b.denominator[row],
                b.sum + row * s.width, s.width, b.weight[panel % 2] + r * kBlockKeys);
        waiting.advance(r + 1, kPanelRows);
      }
    }
    waiting.advance(1, 1);
    Products::fence();
  }
}

template <class Products>
void prefill_head(const AttentionArgs& args, const AttentionTask& task, const PrefillShape& s,
                  const PrefillBuffers& b) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task);
  const int32_t* blocks = args.block_table + task.sequence * args.block_table_stride;
  for (int64_t key = task.key_begin; key < task.key_end; key += kBlockKeys) {
    const int64_t tiles = min(kBlockKeys, round_up(task.key_end - key, 32)) / 16;
    for (int64_t t = 0; t < tiles; ++t) {
      // Beyond the end the last tile stands in, with scales of 0: everything multiplied is finite.
      const int64_t at = min(key + 16 * t, (task.key_end - 1) / 16 * 16);
      const int64_t valid = max(task.key_end - key - 16 * t, int64_t{0});
      const uint8_t* page = args.cache + blocks[at / p.tokens] * args.block_stride + task.kv_head * args.head_stride;
      unpack_block_tile(p, s, {page, at % p.tokens, valid}, t, b.block);
    }
    // Causality and the window each cut off rows at one end.
    const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
    int64_t begin = 0, end = panels;
    const auto position = [&](int64_t row) { return task.position + min(row, rows - 1) / args.group; };
    while (begin < end && position((begin + 1) * kPanelRows - 1) < key) ++begin;
    while (args.window >= 0 && begin < end && position((end - 1) * kPanelRows) - args.window + 1 >= key + kBlockKeys)
      --end;
    if (begin < end) attend_block<Products>(args, task, s, key, begin, end, b);
  }
}

template <class Products>
void prefill_task(const AttentionArgs& args, const AttentionTask& task) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), padded = round_up(rows, kPanelRows);
  const PrefillShape s = prefill_shape(p);
  uint8_t* next = nullptr;
  const auto take = [&](int64_t bytes) {
    uint8_t* taken = next;
    next += round_up(bytes, 64);
    return taken;
  };
  PrefillBuffers b{};
  // Once to measure, once to place.
  for (int round = 0; round < 2; ++round) {
    if (round) next = static_cast<uint8_t*>(thread_scratch(Slot::attention, reinterpret_cast<intptr_t>(next)));
    b.query = reinterpret_cast<uint16_t*>(take(padded * s.dims * 2));
    b.turning = take(kPanelRows * (rotation_depth(p) * 2 + s.dims * 4));
    for (int i = 0; i < 2; ++i) {
      b.weight[i] = reinterpret_cast<uint16_t*>(take(kPanelRows * kBlockKeys * 2));
      for (float*& score : b.score[i]) score = reinterpret_cast<float*>(take(kPanelRows * kBlockKeys * 4));
    }
    b.sum = reinterpret_cast<float*>(take(padded * s.width * 4));
    b.row_max = reinterpret_cast<float*>(take(padded * 4));
    b.denominator = reinterpret_cast<float*>(take(padded * 4));
    b.block.key = take(kBlockKeys / 16 * s.key_bytes);
    b.block.value = take(s.tiles * s.value_bytes);
    b.block.scales = reinterpret_cast<BlockScales*>(take(sizeof(BlockScales)));
  }
  // Rows of dims that are only padding stay 0, whatever lay there: 0 · NaN would be NaN. Weights of spare rows too.
  __builtin_memset(b.block.key, 0, static_cast<size_t>(kBlockKeys / 16 * s.key_bytes));
  for (uint16_t* weight : b.weight) __builtin_memset(weight, 0, static_cast<size_t>(kPanelRows * kBlockKeys) * 2);
  [[maybe_unused]] const Products products;  // what the products need while they last
  for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
    AttentionTask one = task;
    one.kv_head += kv;
    one.kv_heads = 1;
    load_panels<Products>(args, one, s, b.turning, b.query);
    __builtin_memset(b.sum, 0, static_cast<size_t>(padded * s.width) * 4);
    for (int64_t r = 0; r < padded; ++r) b.row_max[r] = kUnseen, b.denominator[r] = 0.0f;
    prefill_head<Products>(args, one, s, b);
    for (int64_t r = 0; r < rows; ++r) {
      const float* sum = b.sum + r * s.width;  // the spare lane holds Σ P · zero point
      const LaneSum lanes{sum, s.low_tiles, {_mm512_set1_ps(sum[p.low_padded / 2]), _mm512_setzero_ps()}};
      finish_lanes(args, task, kv, r, lanes, b.row_max[r], b.row_max[r] > kUnseen, b.denominator[r]);
    }
  }
}

}  // namespace
}  // namespace resq
