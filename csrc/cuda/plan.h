// Where a LinearPlan's columns lie in the quantized activations of formats.h. Host code without torch headers.
#pragma once

#include <cstdint>
#include <vector>

#include "formats.h"

namespace resq::cuda {

// A stretch of x's columns that is a stretch of a part too: what the quantize kernels walk.
struct ColumnSpan {
  int32_t column;   // first column in x
  int32_t columns;
  int32_t group;
  int32_t at;       // its place in the row as codes of one byte each: the low part's, then the high part's padded columns
};

struct ActivationPlan {
  std::vector<RunSpan> runs;      // in the plan's order, which is that of the epilogue's float sums
  std::vector<ColumnSpan> spans;  // in x's column order, merged where no padding lies between
  std::vector<int32_t> group_bits;
  int64_t columns = 0;              // K
  int64_t used[2] = {0, 0};         // padded columns of a part's runs
  int64_t padded[2] = {0, 0};       // the same with the pitch's padding
  int64_t pitch[2] = {0, 0};        // bytes
  int64_t row_bytes = 0;            // pitch[0] + pitch[1]
  int64_t scale_rows = 0;           // rows of the weight scales
  Store store[2] = {Store::u8, Store::u8};
};

// `segments`: columns, part, group triples of LinearPlan.flat_segments(). `nibbles`: store the low part as u4 where all
// its groups have 4 bits (it stays u8 otherwise). Throws std::runtime_error with one sentence on malformed arguments.
ActivationPlan make_activation_plan(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits,
                                    int64_t weight_group, bool nibbles);

}  // namespace resq::cuda
