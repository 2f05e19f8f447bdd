// Attention of few query rows over packed pages, in integers: Q·Kᵀ and P·V straight on the codes.
//
// K's tile is laid out like a weight of the linear layer with tokens as outputs, V's likewise with dims as outputs and
// tokens as the summed index. Both products take q and the weights P·scale as two signed bytes a value (14 bits and the
// sign, see decode_softmax.h), so nothing is rounded more coarsely than in float16, and codes are never converted.
// `Products` does the two products: VpdpbusdProducts or TileProducts.
#pragma once

#include "decode_softmax.h"
#include "lanes.h"

namespace resq {
namespace {

constexpr int64_t kPassRows = 8;  // query rows that are multiplied together: 16 rows of bytes

// Sizes that follow from the page and the number of rows.
struct DecodeShape {
  int64_t rows;                   // query rows of a pass
  int64_t low_bytes, query_bytes; // of a row of query codes: the low part padded to 64, both parts
  int64_t low_lanes, high_lanes;  // vectors of 16 dims: of one nibble of V's low part, of its high part
  int64_t width;                  // floats of a sum in that order: low nibbles, high nibbles, high part
};

DecodeShape decode_shape(const PageLayout& p, int64_t task_rows) {
  DecodeShape s{};
  const int64_t passes = (task_rows + kPassRows - 1) / kPassRows;
  s.rows = (task_rows + passes - 1) / passes;
  s.low_bytes = round_up(p.low_padded, 64);
  s.query_bytes = s.low_bytes + round_up(p.high_padded, 64);
  s.low_lanes = (p.low_padded / 2 + 15) / 16;
  s.high_lanes = (p.high_padded + 15) / 16;
  s.width = 16 * (2 * s.low_lanes + s.high_lanes);
  return s;
}

struct Chunk {
  const uint8_t* page;
  int64_t token, tokens;  // the first within the page; how many, a multiple of 16
};

// Integer operands and results of a pass. Rows of bytes: high bytes of all rows, then low bytes of all rows.
struct PassIntegers {
  const int8_t* query;  // [2 rows, query_bytes]
  int32_t* score[2];    // [2 rows, kChunk], by part
  int8_t* weight[2];    // [2 rows, kChunk], by part
  int32_t* output;      // [2 rows, width]
};

struct DecodeBuffers {
  int8_t* query;    // [kv heads, passes, 2 rows, query_bytes]
  QueryRow* row;    // [kv heads, passes, rows]
  float *sum, *denominator, *zero, *row_max;  // of one kv head: [rows, width], [rows, 16], [rows, 2, 16], [rows]
  PassIntegers integers;
  ChunkScales* scales;
  void* products;
};

// Codes of all of the task's queries, pass by pass.
void quantize_queries(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, int64_t passes,
                      float* rotated, float* scratch, const DecodeBuffers& b) {
  const PageLayout& p = args.page;
  const int64_t heads = task.kv_heads * args.group, rows = task_rows(args, task);
  const float scale = args.scale * kLog2e;
  alignas(64) float padded[2 * kMaxHeadDim];
  for (int64_t query = 0; query < task.queries; ++query) {
    load_rotated(args, task, query, 1, scratch, rotated);
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = rotated + h * p.head_dim;
      for (int64_t i = 0; i < shape.query_bytes; i += 16) _mm512_store_ps(padded + i, _mm512_setzero_ps());
      __builtin_memcpy(padded, from, static_cast<size_t>(p.low) * 4);
      __builtin_memcpy(padded + shape.low_bytes, from + p.low, static_cast<size_t>(p.high) * 4);
      const int64_t r = query * args.group + h % args.group, pass = r / shape.rows, in_pass = r % shape.rows;
      const int64_t block = h / args.group * passes + pass;
      int8_t* high = b.query + (block * 2 * shape.rows + in_pass) * shape.query_bytes;
      int8_t* low = high + shape.rows * shape.query_bytes;
      QueryRow& row = b.row[block * shape.rows + in_pass];
      quantize_query(padded, shape.low_bytes, high, low, row.unit[0], row.sum[0]);
      if (p.high)
        quantize_query(padded + shape.low_bytes, shape.query_bytes - shape.low_bytes, high + shape.low_bytes,
                       low + shape.low_bytes, row.unit[1], row.sum[1]);
      for (int64_t part = 0; part < p.parts; ++part) row.unit[part] *= scale, row.sum[part] *= scale;
    }
  }
  // The last pass may be short: its spare rows are multiplied like the others.
  for (int64_t kv = 0; kv < task.kv_heads; ++kv)
    for (int64_t r = rows; r < passes * shape.rows; ++r) {
      int8_t* high = b.query + ((kv * passes + passes - 1) * 2 * shape.rows + r % shape.rows) * shape.query_bytes;
      __builtin_memset(high, 0, static_cast<size_t>(shape.query_bytes));
      __builtin_memset(high + shape.rows * shape.query_bytes, 0, static_cast<size_t>(shape.query_bytes));
    }
}

template <int kParts>
RowSums softmax_tiles(int64_t tiles, const ChunkScales& s, const QueryRow& row, const RowIntegers& at, int64_t begin,
                      int64_t end) {
  switch (tiles) {
    case 1: return softmax_chunk<1, kParts>(s, row, at, begin, end);
    case 2: return softmax_chunk<2, kParts>(s, row, at, begin, end);
    case 3: return softmax_chunk<3, kParts>(s, row, at, begin, end);
    case 4: return softmax_chunk<4, kParts>(s, row, at, begin, end);
    case 5: return softmax_chunk<5, kParts>(s, row, at, begin, end);
    case 6: return softmax_chunk<6, kParts>(s, row, at, begin, end);
    case 7: return softmax_chunk<7, kParts>(s, row, at, begin, end);
    default: return softmax_chunk<8, kParts>(s, row, at, begin, end);
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

void add_outputs(const DecodeShape& shape, const ChunkScales& s, const ChunkFactors& f, const int32_t* high,
                 const int32_t* low, float* sum) {
  const __m512 shrink = _mm512_set1_ps(f.shrink);
  const __m512 unit[2] = {_mm512_set1_ps(f.weight * s.value_unit[0]), _mm512_set1_ps(f.weight * s.value_unit[1])};
  const int64_t low_width = 32 * shape.low_lanes;
  for (int64_t c = 0; c < shape.width; c += 16) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high + c), 7),
                                          _mm512_loadu_si512(low + c));
    const __m512 shrunk = _mm512_mul_ps(_mm512_load_ps(sum + c), shrink);
    _mm512_store_ps(sum + c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), unit[c >= low_width], shrunk));
  }
}

// One chunk for one pass of rows; `first` is the pass's first row.
template <class Products>
void attend_chunk(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, const Chunk& chunk,
                  int64_t key, int64_t first, const QueryRow* row, const Products& products, const DecodeBuffers& b) {
  const PassIntegers& n = b.integers;
  const int64_t count = min(shape.rows, task_rows(args, task) - first);
  products.scores(chunk, n);
  RowSums sums[kPassRows];
  for (int64_t r = 0; r < count; ++r) {
    RowIntegers at;
    for (int part = 0; part < 2; ++part) {
      for (int half = 0; half < 2; ++half) {
        at.score[part][half] = n.score[part] + (half * shape.rows + r) * kChunk;
        at.weight[part][half] = n.weight[part] + (half * shape.rows + r) * kChunk;
      }
    }
    const int64_t position = task.position + (first + r) / args.group;
    const int64_t oldest = args.window < 0 ? 0 : position - args.window + 1;
    const int64_t end = min(position + 1, task.key_end) - key;
    sums[r] = args.page.parts == 2 ? softmax_tiles<2>(chunk.tokens / 16, *b.scales, row[r], at, oldest - key, end)
                                   : softmax_tiles<1>(chunk.tokens / 16, *b.scales, row[r], at, oldest - key, end);
  }
  products.outputs(chunk, n);
  for (int64_t r = 0; r < count; ++r) {
    if (sums[r].highest <= kLowest) continue;
    const int64_t at = first + r;
    const ChunkFactors f = advance_maximum(sums[r].highest, b.row_max[at]);
    const __m512 shrink = _mm512_set1_ps(f.shrink);
    const auto add = [&](float* to, __m512 what, float factor) {
      _mm512_store_ps(to, _mm512_fmadd_ps(what, _mm512_set1_ps(factor), _mm512_mul_ps(_mm512_load_ps(to), shrink)));
    };
    add(b.denominator + at * 16, sums[r].denominator, f.weight);
    for (int64_t part = 0; part < args.page.parts; ++part)
      add(b.zero + (at * 2 + part) * 16, sums[r].zero[part], f.weight * b.scales->value_unit[part]);
    add_outputs(shape, *b.scales, f, n.output + r * shape.width, n.output + (shape.rows + r) * shape.width,
                b.sum + at * shape.width);
  }
}

RESQ_INLINE __m512 add_lanes(const float* x) { return _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(x))); }

template <class Products>
void decode_task(const AttentionArgs& args, const AttentionTask& task) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), heads = task.kv_heads * args.group;
  const DecodeShape shape = decode_shape(p, rows);
  const int64_t passes = (rows + shape.rows - 1) / shape.rows, padded = passes * shape.rows;
  uint8_t* next = nullptr;
  const auto take = [&](int64_t bytes) {
    uint8_t* taken = next;
    next += round_up(bytes, 64);
    return taken;
  };
  DecodeBuffers b{};
  float *rotated = nullptr, *scratch = nullptr;
  // Once to measure, once to place.
  for (int round = 0; round < 2; ++round) {
    if (round) next = static_cast<uint8_t*>(thread_scratch(Slot::attention, reinterpret_cast<intptr_t>(next)));
    b.query = reinterpret_cast<int8_t*>(take(task.kv_heads * padded * 2 * shape.query_bytes));
    b.row = reinterpret_cast<QueryRow*>(take(task.kv_heads * padded * static_cast<int64_t>(sizeof(QueryRow))));
    rotated = reinterpret_cast<float*>(take(heads * p.head_dim * 4));
    scratch = reinterpret_cast<float*>(take(heads * p.head_dim * 4));
    b.sum = reinterpret_cast<float*>(take(padded * shape.width * 4));
    b.denominator = reinterpret_cast<float*>(take(padded * 64));
    b.zero = reinterpret_cast<float*>(take(padded * 128));
    b.row_max = reinterpret_cast<float*>(take(padded * 4));
    b.scales = reinterpret_cast<ChunkScales*>(take(sizeof(ChunkScales)));
    for (int part = 0; part < 2; ++part) {
      b.integers.score[part] = reinterpret_cast<int32_t*>(take(2 * shape.rows * kChunk * 4));
      b.integers.weight[part] = reinterpret_cast<int8_t*>(take(2 * shape.rows * kChunk));
    }
    b.integers.output = reinterpret_cast<int32_t*>(take(2 * shape.rows * shape.width * 4));
    b.products = take(Products::scratch_bytes(shape));
  }
  quantize_queries(args, task, shape, passes, rotated, scratch, b);
  const Products products(p, shape, b.products);
  const int32_t* blocks = args.block_table + task.sequence * args.block_table_stride;
  for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
    __builtin_memset(b.sum, 0, static_cast<size_t>(padded * shape.width) * 4);
    __builtin_memset(b.denominator, 0, static_cast<size_t>(padded) * 64);
    __builtin_memset(b.zero, 0, static_cast<size_t>(padded) * 128);
    for (int64_t r = 0; r < rows; ++r) b.row_max[r] = kLowest;
    Chunk chunk{};
    for (int64_t key = task.key_begin; key < task.key_end; key += chunk.tokens) {
      chunk.page = args.cache + blocks[key / p.tokens] * args.block_stride + (task.kv_head + kv) * args.head_stride;
      chunk.token = key % p.tokens;
      chunk.tokens = min(min(kChunk, p.tokens - chunk.token), round_up(task.key_end - key, kTokenTile));
      load_chunk_scales(p, chunk.page, chunk.token, chunk.tokens, task.key_end - key, *b.scales);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t block = kv * passes + pass;
        b.integers.query = b.query + block * 2 * shape.rows * shape.query_bytes;
        attend_chunk(args, task, shape, chunk, key, pass * shape.rows, b.row + block * shape.rows, products, b);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const LaneSum sum{b.sum + r * shape.width, shape.low_lanes, {add_lanes(b.zero + r * 32), add_lanes(b.zero + r * 32 + 16)}};
      finish_lanes(args, task, kv, r, sum, b.row_max[r], b.row_max[r] > kLowest,
                   _mm512_reduce_add_ps(_mm512_load_ps(b.denominator + r * 16)));
    }
  }
}

}  // namespace
}  // namespace resq
