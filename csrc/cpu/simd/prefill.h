// Attention of many query rows over packed pages in bfloat16, with float32 scores and sums.
//
// A block of keys and values is unpacked once for all query rows of the task (prefill_unpack.h); rows are taken 32 at a
// time. q and P·scale are rounded to bfloat16; codes, scales and zero points are not. `Products` multiplies,
// on AMX tiles.
#pragma once

#include "exp2.h"
#include "prefill_query.h"

namespace resq {
namespace {

constexpr float kUnseen = -3e38f;
// How far, in powers of 2, a score may exceed the maximum that a row's weights are relative to. Rescaling only then is
// rare after a row's first block, so the processor predicts it and computes the weights before it knows the maximum.
// bfloat16 and float32 are as exact for weights of 256 as of 1.
constexpr float kHeadroom = 8.0f;

struct PrefillBuffers {
  uint16_t* query;      // bfloat16 [rows, dims]
  uint16_t* weight[2];  // bfloat16 [32, kBlockKeys]: of the panel in softmax, and of the one before
  float* score[2];      // [32, kBlockKeys]: of the panel in softmax, and of the one after
  float *sum, *row_max;
  float* denominator;   // [rows, 16], lanes to be added
  bool* started;        // whether a panel's sums hold anything yet
  PrefillBlock block;
  uint8_t* turning;     // of load_panels
};

// One row's state.
struct PanelRow {
  float &row_max, *denominator, *sum;
  int64_t width;
};

// Scores of a row's keys, [begin, end) of which it sees, -> probabilities times V's low scale, in bfloat16.
template <int N, bool kMasked>
void softmax_panel_row(const BlockScales& s, const float* scores, int64_t begin, int64_t end, const PanelRow& row,
                       uint16_t* weight) {
  __m512 score[N];
  __mmask16 seen[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    score[i] = _mm512_mul_ps(_mm512_load_ps(scores + 16 * i), _mm512_load_ps(s.key + 16 * i));
  if constexpr (kMasked) {
    const __m512i first = key_bound(begin, kBlockKeys), last = key_bound(end, kBlockKeys);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      seen[i] = keys_seen(16 * i, first, last);
      score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kUnseen), seen[i], score[i]);
    }
  }
  __m512 highest = score[0];
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) highest = _mm512_max_ps(highest, score[i]);
  if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(row.row_max + kHeadroom), _CMP_GT_OQ)) {
    const float block_max = _mm512_reduce_max_ps(highest);
    if (row.row_max > kUnseen) {
      const __m512 shrink = exp2_negative(_mm512_set1_ps(row.row_max - block_max));
      _mm512_store_ps(row.denominator, _mm512_mul_ps(_mm512_load_ps(row.denominator), shrink));
      for (int64_t i = 0; i < row.width; i += 16)
        _mm512_store_ps(row.sum + i, _mm512_mul_ps(_mm512_load_ps(row.sum + i), shrink));
    }
    row.row_max = block_max;
  }
  const __m512 reference = _mm512_set1_ps(row.row_max);
  __m512 total[2] = {_mm512_load_ps(row.denominator), _mm512_setzero_ps()};
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 2) {
    __m512 p[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      p[j] = exp2_negative(_mm512_sub_ps(score[i + j], reference));
      if constexpr (kMasked) p[j] = _mm512_maskz_mov_ps(seen[i + j], p[j]);
      total[j] = _mm512_add_ps(total[j], p[j]);
      p[j] = _mm512_mul_ps(p[j], _mm512_load_ps(s.value + 16 * (i + j)));
    }
    _mm512_store_si512(weight + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
  }
  _mm512_store_ps(row.denominator, _mm512_add_ps(total[0], total[1]));
}

using RowSoftmax = decltype(&softmax_panel_row<2, false>);

// For the first `keys` keys of a block, a multiple of 32.
RowSoftmax row_softmax(int64_t keys, bool masked) {
  static_assert(kBlockKeys == 128);
  static constexpr RowSoftmax list[2][4] = {{softmax_panel_row<2, false>, softmax_panel_row<4, false>,
                                             softmax_panel_row<6, false>, softmax_panel_row<8, false>},
                                            {softmax_panel_row<2, true>, softmax_panel_row<4, true>,
                                             softmax_panel_row<6, true>, softmax_panel_row<8, true>}};
  return list[masked][keys / 32 - 1];
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
  Product product_[2];
  Block block_[kBlockKeys / 32 + kMaxHeadDim / 32 + 2];
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
  for (int64_t panel = begin - 1; panel <= end; ++panel) {
    Waiting<Products> waiting;
    if (panel + 1 < end)
      waiting.push({b.query + (panel + 1) * kPanelRows * s.dims, s.dims * 2, s.dims / 32, b.block.key, s.key_bytes,
                    keys_of(panel + 1) / 16, b.score[(panel + 1) % 2], kBlockKeys}, false);
    if (panel > begin) {
      waiting.push({b.weight[(panel - 1) % 2], kBlockKeys * 2, keys_of(panel - 1) / 32, b.block.value, s.value_bytes,
                    s.tiles, b.sum + (panel - 1) * kPanelRows * s.width, s.width}, b.started[panel - 1]);
      b.started[panel - 1] = true;
    }
    Products::fence();
    if (begin <= panel && panel < end) {
      const int64_t first = panel * kPanelRows, rows = min(kPanelRows, all_rows - first), keys = keys_of(panel);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        const int64_t oldest = (args.window < 0 ? 0 : position(row) - args.window + 1) - key;
        const int64_t newest = min(position(row) + 1, task.key_end) - key;
        row_softmax(keys, oldest > 0 || newest < keys)(
            *b.block.scales, b.score[panel % 2] + r * kBlockKeys, oldest, newest,
            {b.row_max[row], b.denominator + row * 16, b.sum + row * s.width, s.width},
            b.weight[panel % 2] + r * kBlockKeys);
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

// finish_row with the maximum in powers of 2; a null sum is one that saw no key. Whole heads of bfloat16 go straight to
// `out`.
void finish_dims(const AttentionArgs& args, const AttentionTask& task, int64_t kv, int64_t r, const float* sum,
                 float row_max, float denominator) {
  const PageLayout& p = args.page;
  if (!sum || task.partial_sum || args.out_dtype != DType::bf16 || p.low != p.low_padded || p.head_dim % 16) {
    alignas(64) float zeros[kMaxHeadDim + 64] = {};
    finish_row(args, task, kv, r, sum ? sum : zeros, row_max > kUnseen ? row_max * kLn2 : kNegativeInfinity,
               denominator);
    return;
  }
  const int64_t token = task.query_row + r / args.group, head = (task.kv_head + kv) * args.group + r % args.group;
  uint16_t* out = static_cast<uint16_t*>(
      element(args.out, args.out_dtype, token * args.out_token_stride + head * args.out_head_stride));
  const __m512 inverse = _mm512_set1_ps(1.0f / (denominator > 0.0f ? denominator : 1.0f));
  for (int64_t i = 0; i < p.head_dim; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sum + i), inverse)));
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
      b.score[i] = reinterpret_cast<float*>(take(kPanelRows * kBlockKeys * 4));
    }
    b.sum = reinterpret_cast<float*>(take(padded * s.width * 4));
    b.row_max = reinterpret_cast<float*>(take(padded * 4));
    b.denominator = reinterpret_cast<float*>(take(padded * 64));
    b.started = reinterpret_cast<bool*>(take(padded / kPanelRows));
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
    __builtin_memset(b.started, 0, static_cast<size_t>(padded / kPanelRows));
    __builtin_memset(b.denominator, 0, static_cast<size_t>(padded) * 64);
    for (int64_t r = 0; r < padded; ++r) b.row_max[r] = kUnseen;
    prefill_head<Products>(args, one, s, b);
    for (int64_t r = 0; r < rows; ++r)
      finish_dims(args, task, kv, r, b.started[r / kPanelRows] ? b.sum + r * s.width : nullptr, b.row_max[r],
                  _mm512_reduce_add_ps(_mm512_load_ps(b.denominator + 16 * r)));
  }
}

}  // namespace
}  // namespace resq
