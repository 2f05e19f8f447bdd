// Attention of few query rows over packed pages, in integers: Q·Kᵀ and P·V straight on the codes.
//
// K's tile is laid out like a weight of the linear layer with tokens as outputs, V's likewise with dims as outputs and
// tokens as the summed index. Both products take q and the weights P·scale as two signed bytes a value (14 bits and the
// sign, see decode_softmax.h), so nothing is rounded more coarsely than in float16, and codes are never converted.
// `Products` does the two products: VpdpbusdProducts or TileProducts.
#pragma once

#include "decode_rows.h"

namespace resq {
namespace {

struct DecodeBuffers {
  int8_t* query;
  QueryRow* row;
  float* scratch;  // of quantize_queries
  float *sum, *denominator, *zero, *row_max;  // [kv heads, rows] of width, 16, 2 x 16 and 1
  float* score;       // of PassOperands
  int8_t* weight[2];  // of PassOperands
  int32_t* output;    // [2 rows, width], unless the products add to `sum`
  ChunkScales* scales;
};

void add_outputs(const DecodeShape& shape, const float* value_unit, const ChunkFactors& f, const int32_t* high,
                 const int32_t* low, float* sum) {
  const __m512 shrink = _mm512_set1_ps(f.shrink);
  const __m512 unit[2] = {_mm512_set1_ps(f.weight * value_unit[0]), _mm512_set1_ps(f.weight * value_unit[1])};
  const int64_t low_width = 32 * shape.low_lanes;
  for (int64_t c = 0; c < shape.width; c += 16) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high + c), 7),
                                          _mm512_loadu_si512(low + c));
    const __m512 shrunk = _mm512_mul_ps(_mm512_load_ps(sum + c), shrink);
    _mm512_store_ps(sum + c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), unit[c >= low_width], shrunk));
  }
}

// The items of a task in order: kv heads, chunks, passes.
class Items {
 public:
  Items(const AttentionArgs& args, const AttentionTask& task, int64_t passes)
      : args_(args), task_(task), passes_(passes),
        blocks_(args.block_table + task.sequence * args.block_table_stride) {
    next_.valid = task.key_begin < task.key_end;
    next_.key = task.key_begin;
    place();
  }

  // Of the item that take() will give next; without a page after the last.
  Chunk next_chunk() const { return next_.valid ? next_.chunk : Chunk{}; }

  Item take() {
    const Item item = next_;
    if (!item.valid) return item;
    if (++next_.pass < passes_) return item;
    next_.pass = 0;
    next_.key += next_.chunk.tokens;
    if (next_.key >= task_.key_end) {
      next_.key = task_.key_begin;
      next_.valid = ++next_.kv < task_.kv_heads;
    }
    place();
    return item;
  }

 private:
  void place() {
    if (!next_.valid) return;
    const int64_t tokens = args_.page.tokens, key = next_.key;
    next_.chunk.page = args_.cache + blocks_[key / tokens] * args_.block_stride +
                       (task_.kv_head + next_.kv) * args_.head_stride;
    next_.chunk.token = key % tokens;
    next_.chunk.tokens = min(min(kChunk, tokens - next_.chunk.token), round_up(task_.key_end - key, kTokenTile));
  }

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const int64_t passes_;
  const int32_t* blocks_;
  Item next_;
};

// Takes the item's denominators and zero points into the rows' sums; `at`: the first of the rows in `b`.
void add_sums(const AttentionArgs& args, int64_t at, int64_t count, const RowSums* row_sums,
              const ChunkFactors* factors, const DecodeBuffers& b) {
  for (int64_t r = 0; r < count; ++r) {
    const RowSums& sums = row_sums[r];
    if (!sums.seen) continue;
    const ChunkFactors f = factors[r];
    const __m512 shrink = _mm512_set1_ps(f.shrink);
    const auto add = [&](float* to, const __m512& what, float factor) {
      _mm512_store_ps(to, _mm512_fmadd_ps(what, _mm512_set1_ps(factor), _mm512_mul_ps(_mm512_load_ps(to), shrink)));
    };
    add(b.denominator + (at + r) * 16, sums.denominator, f.weight);
    for (int64_t part = 0; part < args.page.parts; ++part)
      add(b.zero + ((at + r) * 2 + part) * 16, sums.zero[part], f.weight * b.scales->value_unit[part]);
  }
}

RESQ_INLINE __m512 add_lanes(const float* x) { return _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(x))); }

// Whether products add to the rows' sums themselves; otherwise they leave integers for add_outputs.
template <class Products>
constexpr bool kAddsOutputs = requires { &Products::add_outputs; };

// Item by item: running the next item's products beside the softmax needs two of every buffer and was no faster. What an
// item touches fits the L1 cache (40 KiB of it with head_dim 64 and eight rows): prefetches from memory fill the line
// buffers, and every load that misses waits for one.
template <class Products>
void decode_task(const AttentionArgs& args, const AttentionTask& task) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task);
  const DecodeShape shape = decode_shape(p, rows);
  const int64_t padded = task.kv_heads * shape.passes * shape.rows;
  uint8_t* next = nullptr;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(*pointer)), 64);
  };
  DecodeBuffers b{};
  uint8_t* products_scratch = nullptr;
  // Once to measure, once to place.
  for (int round = 0; round < 2; ++round) {
    if (round) next = static_cast<uint8_t*>(thread_scratch(Slot::attention, reinterpret_cast<intptr_t>(next)));
    take(b.query, padded * 2 * shape.query_bytes);
    take(b.row, padded);
    take(b.scratch, 2 * task.kv_heads * args.group * p.head_dim);
    take(b.sum, padded * shape.width);
    take(b.denominator, padded * 16);
    take(b.zero, padded * 32);
    take(b.row_max, padded);
    take(b.score, shape.rows * kScoreStride);
    for (int8_t*& weight : b.weight) take(weight, 2 * shape.rows * kRowStride);
    if (!kAddsOutputs<Products>) take(b.output, 2 * shape.rows * shape.width);
    take(b.scales, 1);
    take(products_scratch, Products::scratch_bytes(shape));
  }
  Prefetch prefetch;
  Items items(args, task, shape.passes);
  // Nothing comes before the first chunk to hide it but this.
  prefetch.start(p, items.next_chunk(), 0);
  prefetch.finish();
  quantize_queries(args, task, shape, b.scratch, b.query, b.row);
  __builtin_memset(b.sum, 0, static_cast<size_t>(padded * shape.width) * 4);
  __builtin_memset(b.denominator, 0, static_cast<size_t>(padded) * 64);
  __builtin_memset(b.zero, 0, static_cast<size_t>(padded) * 128);
  for (int64_t r = 0; r < padded; ++r) b.row_max[r] = kLowest;

  const Products products(p, shape, products_scratch, prefetch);
  RowSums sums[kPassRows];
  ChunkFactors factors[kPassRows];
  for (Item item = items.take(); item.valid; item = items.take()) {
    const int64_t row = (item.kv * shape.passes + item.pass) * shape.rows;
    const PassOperands operands{
        b.query + 2 * row * shape.query_bytes, b.row + row, b.score, {b.weight[0], b.weight[1]}};
    prefetch.finish();
    // About as many steps as softmax and products will make.
    prefetch.start(p, items.next_chunk(), Products::prefetch_steps(p, shape) + kSoftmaxSteps * shape.rows);
    const int64_t count = min(shape.rows, rows - item.pass * shape.rows);  // the last pass may be short
    const auto load_scales = [&] {
      const Chunk& c = item.chunk;
      if (item.pass == 0) load_chunk_scales(p, c.page, c.token, c.tokens, task.key_end - item.key, *b.scales);
    };
    if constexpr (kAddsOutputs<Products>) load_scales();  // their divisions end while the products are made
    products.scores(item.chunk, operands);
    if constexpr (kAddsOutputs<Products>) {
      softmax_together(args, task, shape, item, operands, *b.scales, count, sums, b.row_max + row, factors, prefetch);
    } else {
      load_scales();
      softmax_rows(args, task, shape, item, operands, *b.scales, count, sums, b.row_max + row, factors, prefetch);
    }
    add_sums(args, row, count, sums, factors, b);
    float* sum = b.sum + row * shape.width;
    if constexpr (kAddsOutputs<Products>) {
      products.add_outputs(item.chunk, operands, factors, b.scales->value_unit, sum);
    } else {
      products.outputs(item.chunk, operands, b.output);
      for (int64_t r = 0; r < count; ++r)
        add_outputs(shape, b.scales->value_unit, factors[r], b.output + r * shape.width,
                    b.output + (shape.rows + r) * shape.width, sum + r * shape.width);
    }
  }
  for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = kv * shape.passes * shape.rows + r;
      const LaneSum sum{b.sum + at * shape.width, shape.low_lanes,
                        {add_lanes(b.zero + at * 32), add_lanes(b.zero + at * 32 + 16)}};
      finish_lanes(args, task, kv, r, sum, b.row_max[at], b.row_max[at] > kLowest,
                   _mm512_reduce_add_ps(_mm512_load_ps(b.denominator + at * 16)));
    }
  }
}

}  // namespace
}  // namespace resq
