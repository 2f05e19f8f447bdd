// Attention over the packed cache for callers that hold q, k and v as columns of one tensor, without a view of each.
#pragma once

#include <optional>

#include "tensors.h"

namespace resq {

// [tokens, heads, head_dim], strides in elements; the values of a head lie side by side.
struct HeadRows {
  void* data;
  DType dtype;
  int64_t tokens, heads, head_dim, token_stride, head_stride;
};

// ops.h, kv_write_attention.
void write_and_attend(const HeadRows& query, const HeadRows& key, const HeadRows& value, const Tensor& kv_cache,
                      const HeadRows& out, const Tensor& slot_mapping, const Tensor& block_table,
                      const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
                      double scale, int64_t high, int64_t low_bits, int64_t sliding_window);

}  // namespace resq
