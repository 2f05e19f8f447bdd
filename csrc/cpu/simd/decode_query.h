// The decode path's sizes, and its query rows as integers.
#pragma once

#include "attention_rows.h"
#include "decode_softmax.h"

namespace resq {
namespace {

constexpr int64_t kPassRows = 8;  // query rows that are multiplied together: 16 rows of bytes

// Sizes that follow from the page and the number of rows.
struct DecodeShape {
  int64_t rows, passes;           // query rows of a pass; passes of a kv head
  int64_t low_bytes, query_bytes; // of a row of query codes: the low part padded to 64, both parts
  int64_t low_lanes, high_lanes;  // vectors of 16 dims: of one nibble of V's low part, of its high part
  int64_t width;                  // floats of a sum in that order: low nibbles, high nibbles, high part
};

DecodeShape decode_shape(const PageLayout& p, int64_t task_rows) {
  DecodeShape s{};
  s.passes = (task_rows + kPassRows - 1) / kPassRows;
  s.rows = (task_rows + s.passes - 1) / s.passes;
  s.low_bytes = round_up(p.low_padded, 64);
  s.query_bytes = s.low_bytes + round_up(p.high_padded, 64);
  s.low_lanes = (p.low_padded / 2 + 15) / 16;
  s.high_lanes = (p.high_padded + 15) / 16;
  s.width = 16 * (2 * s.low_lanes + s.high_lanes);
  return s;
}

// Codes of all of the task's queries, pass by pass.
// query [kv heads, passes, 2 rows, query_bytes]: the high bytes of a pass's rows, then their low bytes. row [kv heads,
// passes, rows]. scratch: float32 [2, kv heads · group, head_dim].
void quantize_queries(const AttentionArgs& args, const AttentionTask& task, const DecodeShape& shape, float* scratch,
                      int8_t* query_codes, QueryRow* row) {
  const PageLayout& p = args.page;
  const int64_t heads = task.kv_heads * args.group, rows = task_rows(args, task), passes = shape.passes;
  float* rotated = scratch + heads * p.head_dim;
  const float scale = args.scale * kLog2e;
  for (int64_t query = 0; query < task.queries; ++query) {
    load_rotated(args, task, query, 1, scratch, rotated);
    const float* from = rotated;
    for (int64_t kv = 0; kv < task.kv_heads; ++kv) {
      for (int64_t head = 0; head < args.group; ++head, from += p.head_dim) {
        const int64_t r = query * args.group + head, pass = r < shape.rows ? 0 : r / shape.rows;
        const int64_t block = kv * passes + pass, in_pass = r - pass * shape.rows;
        int8_t* high = query_codes + (block * 2 * shape.rows + in_pass) * shape.query_bytes;
        int8_t* low = high + shape.rows * shape.query_bytes;
        quantize_query(from, p, shape.low_bytes, scale, high, low, row[block * shape.rows + in_pass]);
      }
    }
  }
  // The last pass may be short: its spare rows are multiplied like the others.
  for (int64_t kv = 0; kv < task.kv_heads; ++kv)
    for (int64_t r = rows; r < passes * shape.rows; ++r) {
      int8_t* high = query_codes + ((kv * passes + passes - 1) * 2 * shape.rows + r % shape.rows) * shape.query_bytes;
      __builtin_memset(high, 0, static_cast<size_t>(shape.query_bytes));
      __builtin_memset(high + shape.rows * shape.query_bytes, 0, static_cast<size_t>(shape.query_bytes));
    }
}

}  // namespace
}  // namespace resq
