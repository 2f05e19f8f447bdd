// The packed KV cache and a batch that uses it, checked and as kernels take them: what the ops of op_kv.cpp share with
// callers that keep a cache from step to step, or hold q, k and v as columns of one tensor.
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

// kv_cache uint8 [blocks, heads, N, C] with contiguous pages. Valid while the tensor lives.
struct PackedCache {
  PageLayout page;
  uint8_t* data;
  int64_t blocks, heads, block_stride, head_stride;
};

// resq_vllm/formats/kv_layout.py in C++.
PageLayout page_layout(int64_t head_dim, int64_t high, int64_t low_bits, int64_t tokens);
PackedCache packed_cache(const Tensor& kv_cache, int64_t head_dim, int64_t high, int64_t low_bits);

// How a layer attends: U_C or null, what scores are multiplied by, tokens that a query sees (-1 = all).
struct Attending {
  const float* rotation;
  float scale;
  int64_t window;
};
Attending attending(const std::optional<Tensor>& rotation, int64_t head_dim, double scale, int64_t sliding_window);

// The slots of new tokens.
struct Slots {
  const int64_t* data;
  int64_t count;
};
Slots slots_of(const Tensor& slot_mapping);

// Where the sequences' pages are, how long the sequences, and which query rows are theirs.
struct Sequences {
  const int32_t *block_table, *seq_lens, *query_start_loc;
  int64_t count, table_stride, table_blocks;
};
Sequences sequences_of(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc);

// Whether the batch names only slots and blocks that the cache has, for `tokens` query rows and a window.
void check_slots(const Slots& slots, const PackedCache& cache, int64_t tokens);
void check_sequences(const Sequences& sequences, const PackedCache& cache, int64_t window, int64_t tokens);

// The kernels, for a batch that was checked.
void write_kv(const HeadRows& key, const HeadRows& value, const PackedCache& cache, const Slots& slots,
              const float* rotation);
void attend(const HeadRows& query, const PackedCache& cache, const HeadRows& out, const Sequences& sequences,
            const Attending& how);
// Both, the writing within the attention's tasks where that gives the same.
void write_and_attend(const HeadRows& query, const HeadRows& key, const HeadRows& value, const PackedCache& cache,
                      const HeadRows& out, const Slots& slots, const Sequences& sequences, const Attending& how);

}  // namespace resq
