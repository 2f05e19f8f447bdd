// torch.ops.resq.kv_write, attention and both in one.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "attention_kernels.h"
#include "isa.h"
#include "kv.h"

namespace resq {
namespace {

// [tokens, heads, head_dim] of a tensor.
HeadRows heads_of(const Tensor& t, const char* name) {
  check(t.dim() == 3 && (t.size(2) == 1 || t.stride(2) == 1),
        [&] { return std::string(name) + " must have shape [tokens, heads, head_dim] with contiguous heads"; });
  return {const_cast<void*>(t.const_data_ptr()), float_dtype(t, name), t.size(0), t.size(1), t.size(2), t.stride(0),
          t.stride(1)};
}

}  // namespace

void kv_write(const Tensor& key, const Tensor& value, const Tensor& kv_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& rotation, int64_t high, int64_t low_bits) {
  const HeadRows k = heads_of(key, "key"), v = heads_of(value, "value");
  const PackedCache cache = packed_cache(kv_cache, k.head_dim, high, low_bits);
  const Slots slots = slots_of(slot_mapping);
  check_slots(slots, cache, k.tokens);
  write_kv(k, v, cache, slots, attending(rotation, k.head_dim, 1.0, -1).rotation);
}

void attention(const Tensor& query, const Tensor& kv_cache, const Tensor& out, const Tensor& block_table,
               const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
               double scale, int64_t high, int64_t low_bits, int64_t sliding_window) {
  const HeadRows q = heads_of(query, "query"), y = heads_of(out, "out");
  const PackedCache cache = packed_cache(kv_cache, q.head_dim, high, low_bits);
  const Attending how = attending(rotation, q.head_dim, scale, sliding_window);
  const Sequences sequences = sequences_of(block_table, seq_lens, query_start_loc);
  check_sequences(sequences, cache, how.window, q.tokens);
  attend(q, cache, y, sequences, how);
}

void kv_write_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                        const Tensor& out, const Tensor& slot_mapping, const Tensor& block_table,
                        const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
                        double scale, int64_t high, int64_t low_bits, int64_t sliding_window) {
  const HeadRows q = heads_of(query, "query"), k = heads_of(key, "key"), v = heads_of(value, "value");
  const PackedCache cache = packed_cache(kv_cache, k.head_dim, high, low_bits);
  const Attending how = attending(rotation, k.head_dim, scale, sliding_window);
  const Slots slots = slots_of(slot_mapping);
  const Sequences sequences = sequences_of(block_table, seq_lens, query_start_loc);
  check_slots(slots, cache, k.tokens);
  check_sequences(sequences, cache, how.window, q.tokens);
  write_and_attend(q, k, v, cache, heads_of(out, "out"), slots, sequences, how);
}

std::string attention_kernels(std::string dtype, int64_t head_dim, int64_t high, int64_t low_bits) {
  AttentionArgs args{};
  args.page = page_layout(head_dim, high, low_bits, kTokenTile);
  args.scale = 1.0f;
  check(dtype == "bfloat16" || dtype == "float16" || dtype == "float32",
        "dtype must be bfloat16, float16 or float32, not " + dtype);
  args.query_dtype = args.out_dtype = dtype == "bfloat16" ? DType::bf16 : dtype == "float16" ? DType::f16 : DType::f32;
  return describe_attention(kernels(), args);
}

}  // namespace resq
