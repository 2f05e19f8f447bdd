// torch.ops.resq.kv_write, attention and both in one: checks, then the kernels.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "attention_kernels.h"
#include "attention_tasks.h"
#include "isa.h"
#include "kv.h"
#include "tensors.h"

namespace resq {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// resq_vllm/formats/kv_layout.py in C++.
PageLayout page_layout(int64_t head_dim, int64_t high, int64_t low_bits, int64_t tokens) {
  check(low_bits == 4 || low_bits == 8, [&] { return "low_bits must be 4 or 8, not " + std::to_string(low_bits); });
  check(head_dim > 0 && head_dim <= kMaxHeadDim, [&] {
    return "head_dim must be at most " + std::to_string(kMaxHeadDim) + ", not " + std::to_string(head_dim);
  });
  check(high >= 0 && high < head_dim, [&] {
    return std::to_string(high) + " high-precision dims do not fit a head of " + std::to_string(head_dim) + " dims";
  });
  check(tokens > 0 && tokens % kTokenTile == 0, [&] {
    return "the packed KV cache needs a block size that is a multiple of 16, not " + std::to_string(tokens);
  });
  PageLayout p{};
  p.head_dim = head_dim;
  p.high = high;
  p.low = head_dim - high;
  p.low_padded = round_up(p.low, 8);
  p.high_padded = round_up(high, 4);
  p.low_bits = low_bits;
  p.parts = high ? 2 : 1;
  p.tokens = tokens;
  const int64_t low_bytes = tokens * p.low_padded * low_bits / 8, high_bytes = tokens * p.high_padded;
  p.key_low = 0;
  p.key_high = low_bytes;
  p.value_low = p.key_high + high_bytes;
  p.value_high = p.value_low + low_bytes;
  p.scales = p.value_high + high_bytes;
  p.zeros = p.scales + 4 * p.parts * tokens;
  p.bytes = p.zeros + 2 * p.parts * tokens;
  return p;
}

// The layout of the cache's pages; kv_cache uint8 [blocks, heads, N, C] with contiguous pages.
PageLayout check_cache(const Tensor& kv_cache, int64_t head_dim, int64_t high, int64_t low_bits) {
  check_dtype(kv_cache, ScalarType::Byte, "kv_cache", "uint8");
  check(kv_cache.dim() == 4,
        [&] { return "kv_cache must have shape [blocks, heads, N, C], not " + shape_of(kv_cache); });
  const PageLayout p = page_layout(head_dim, high, low_bits, kv_cache.size(2));
  check(kv_cache.size(3) * p.tokens == p.bytes, [&] {
    return "kv_cache has " + std::to_string(kv_cache.size(3)) + " bytes a token and head, but head_dim " +
           std::to_string(head_dim) + " with " + std::to_string(high) + " high dims and " + std::to_string(low_bits) +
           "-bit low dims needs " + std::to_string(p.bytes / p.tokens);
  });
  check(kv_cache.stride(3) == 1 && kv_cache.stride(2) == kv_cache.size(3),
        "kv_cache must have contiguous pages (the last two dims of each block and head)");
  return p;
}

const float* rotation_data(const std::optional<Tensor>& rotation, int64_t head_dim) {
  if (!rotation) return nullptr;
  check_dtype(*rotation, ScalarType::Float, "rotation", "float32");
  check_shape(*rotation, {head_dim, head_dim}, "rotation");
  check_contiguous(*rotation, "rotation");
  return static_cast<const float*>(rotation->const_data_ptr());
}

// [tokens, heads, head_dim] of a tensor.
HeadRows heads_of(const Tensor& t, const char* name) {
  check(t.dim() == 3 && (t.size(2) == 1 || t.stride(2) == 1),
        [&] { return std::string(name) + " must have shape [tokens, heads, head_dim] with contiguous heads"; });
  return {const_cast<void*>(t.const_data_ptr()), float_dtype(t, name), t.size(0), t.size(1), t.size(2), t.stride(0),
          t.stride(1)};
}

void check_like(const HeadRows& t, const HeadRows& like, const char* name, const char* what) {
  check(t.tokens == like.tokens && t.heads == like.heads && t.head_dim == like.head_dim,
        [&] { return std::string(name) + " must have " + what + "'s shape"; });
}

// Tokens that fill a tile of a page together are written tile by tile, the others one by one.
void write_tokens(KVWriteArgs& args, int64_t tokens) {
  const Kernels& k = kernels();
  // Kept from call to call.
  thread_local std::vector<int64_t> tiles, singles;
  thread_local std::vector<uint8_t> prepared;
  tiles.clear();
  singles.clear();
  const auto fills_tile = [&](int64_t t) {
    if (t + kTokenTile > tokens || args.slots[t] < 0 || args.slots[t] % kTokenTile) return false;
    for (int64_t i = 1; i < kTokenTile; ++i)
      if (args.slots[t + i] != args.slots[t] + i) return false;
    return true;
  };
  for (int64_t t = 0; t < tokens;) {
    const bool tile = fills_tile(t);
    (tile ? tiles : singles).push_back(t);
    t += tile ? kTokenTile : 1;
  }
  const KVTileWriter writer =
      tiles.empty() ? KVTileWriter{} : kv_tile_writer(k, args, static_cast<int64_t>(tiles.size()));
  if (!writer.write) {
    torch::stable::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) { k.kv_write(args, begin, end); });
    return;
  }
  if (writer.bytes) {
    prepared.resize(std::max<size_t>(prepared.size(), writer.bytes(args)));
    writer.fill(args, prepared.data());
    args.prepared = prepared.data();
  }
  const int64_t units = static_cast<int64_t>(tiles.size()) * args.heads, rest = static_cast<int64_t>(singles.size());
  const int64_t *first = tiles.data(), *single = singles.data();
  torch::stable::parallel_for(0, units + rest, 1, [&](int64_t begin, int64_t end) {
    if (begin < units) writer.write(args, first, begin, std::min(end, units));
    for (int64_t i = std::max(begin, units); i < end; ++i) k.kv_write(args, single[i - units], single[i - units] + 1);
  });
}

KVWriteArgs check_write(const HeadRows& key, const HeadRows& value, const Tensor& kv_cache, const Tensor& slot_mapping,
                        const std::optional<Tensor>& rotation, int64_t high, int64_t low_bits) {
  KVWriteArgs args{};
  args.page = check_cache(kv_cache, key.head_dim, high, low_bits);
  args.dtype = key.dtype;
  check(value.dtype == key.dtype, "value must have key's dtype");
  check(key.heads == kv_cache.size(1), [&] {
    return "key has " + std::to_string(key.heads) + " heads, but the cache has " + std::to_string(kv_cache.size(1));
  });
  check_like(value, key, "value", "key");
  check_dtype(slot_mapping, ScalarType::Long, "slot_mapping", "int64");
  check(slot_mapping.dim() == 1 && slot_mapping.size(0) <= key.tokens,
        "slot_mapping must be one-dimensional and no longer than key");
  check_contiguous(slot_mapping, "slot_mapping");
  args.rotation = rotation_data(rotation, key.head_dim);
  args.key = key.data;
  args.value = value.data;
  args.key_token_stride = key.token_stride;
  args.key_head_stride = key.head_stride;
  args.value_token_stride = value.token_stride;
  args.value_head_stride = value.head_stride;
  args.cache = static_cast<uint8_t*>(kv_cache.mutable_data_ptr());
  args.block_stride = kv_cache.stride(0);
  args.head_stride = kv_cache.stride(1);
  args.slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  args.heads = key.heads;
  const int64_t tokens = slot_mapping.size(0), slots = kv_cache.size(0) * args.page.tokens;
  for (int64_t t = 0; t < tokens; ++t)
    check(args.slots[t] < slots, [&] {
      return "slot_mapping names slot " + std::to_string(args.slots[t]) + ", but the cache has only " +
             std::to_string(slots);
    });
  return args;
}

struct AttentionCall {
  AttentionArgs args;
  AttentionBatch batch;
};

AttentionCall check_attention(const HeadRows& query, const Tensor& kv_cache, const HeadRows& out,
                              const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                              const std::optional<Tensor>& rotation, double scale, int64_t high, int64_t low_bits,
                              int64_t sliding_window) {
  check_like(out, query, "out", "query");
  AttentionArgs args{};
  args.page = check_cache(kv_cache, query.head_dim, high, low_bits);
  check(query.heads % kv_cache.size(1) == 0, [&] {
    return "query's " + std::to_string(query.heads) + " heads are no multiple of the cache's " +
           std::to_string(kv_cache.size(1)) + " kv heads";
  });
  check_dtype(block_table, ScalarType::Int, "block_table", "int32");
  check_dtype(seq_lens, ScalarType::Int, "seq_lens", "int32");
  check_dtype(query_start_loc, ScalarType::Int, "query_start_loc", "int32");
  const int64_t sequences = seq_lens.numel();
  check(block_table.dim() == 2 && block_table.size(0) >= sequences &&
            (block_table.size(1) <= 1 || block_table.stride(1) == 1),
        "block_table must have shape [sequences, blocks] with contiguous rows");
  check(query_start_loc.dim() == 1 && query_start_loc.size(0) > sequences && query_start_loc.is_contiguous() &&
            seq_lens.is_contiguous(),
        "query_start_loc must hold one more entry than seq_lens, both contiguous");
  check(sliding_window == -1 || sliding_window > 0, "sliding_window must be positive, or -1 for none");
  args.query = query.data;
  args.out = out.data;
  args.query_dtype = query.dtype;
  args.out_dtype = out.dtype;
  args.query_token_stride = query.token_stride;
  args.query_head_stride = query.head_stride;
  args.out_token_stride = out.token_stride;
  args.out_head_stride = out.head_stride;
  args.cache = static_cast<const uint8_t*>(kv_cache.const_data_ptr());
  args.block_stride = kv_cache.stride(0);
  args.head_stride = kv_cache.stride(1);
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.rotation = rotation_data(rotation, query.head_dim);
  args.scale = static_cast<float>(scale);
  args.group = query.heads / kv_cache.size(1);
  args.window = sliding_window;

  AttentionBatch batch{};
  batch.sequences = sequences;
  batch.kv_heads = kv_cache.size(1);
  batch.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  batch.query_start_loc = static_cast<const int32_t*>(query_start_loc.const_data_ptr());
  const int64_t tokens = query.tokens, table_blocks = block_table.size(1), cache_blocks = kv_cache.size(0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t first = batch.query_start_loc[s], end = batch.query_start_loc[s + 1], length = batch.seq_lens[s];
    const auto name = [&] { return "sequence " + std::to_string(s); };
    if (first == end) continue;
    check(0 <= first && first < end && end <= tokens, [&] {
      return name() + ": query_start_loc is not ascending within query's " + std::to_string(tokens) + " tokens";
    });
    check(end - first <= length,
          [&] { return name() + " has more new tokens than its seq_lens " + std::to_string(length); });
    const int64_t blocks = (length + args.page.tokens - 1) / args.page.tokens;
    check(blocks <= table_blocks,
          [&] { return name() + ": block_table is too short for its length " + std::to_string(length); });
    // Blocks that fell out of the window may have been freed, and their entries then name nothing.
    const int64_t oldest = sliding_window < 0 ? 0 : std::max<int64_t>(0, length - (end - first) - sliding_window + 1);
    for (int64_t b = oldest / args.page.tokens; b < blocks; ++b) {
      const int64_t block = args.block_table[s * args.block_table_stride + b];
      check(0 <= block && block < cache_blocks, [&] {
        return name() + ": block_table names block " + std::to_string(block) + " of " + std::to_string(cache_blocks);
      });
    }
  }
  return {args, batch};
}

// Whether the sequences have one new token each, to be written where their own attention reads it. Not where a page
// becomes full: vLLM may have shared it already, as a cached prefix, with another sequence of the batch.
bool write_their_own(const AttentionCall& call, const KVWriteArgs& writes, int64_t tokens) {
  const AttentionBatch& batch = call.batch;
  const int64_t page = writes.page.tokens;
  if (tokens != batch.sequences || batch.query_start_loc[0] != 0) return false;
  for (int64_t s = 0; s < tokens; ++s) {
    const int64_t position = batch.seq_lens[s] - 1, offset = position % page;
    if (batch.query_start_loc[s + 1] != s + 1 || offset == page - 1) return false;
    const int64_t block = call.args.block_table[s * call.args.block_table_stride + position / page];
    if (writes.slots[s] != block * page + offset) return false;
  }
  return true;
}

}  // namespace

void kv_write(const Tensor& key, const Tensor& value, const Tensor& kv_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& rotation, int64_t high, int64_t low_bits) {
  KVWriteArgs args =
      check_write(heads_of(key, "key"), heads_of(value, "value"), kv_cache, slot_mapping, rotation, high, low_bits);
  write_tokens(args, slot_mapping.size(0));
}

void attention(const Tensor& query, const Tensor& kv_cache, const Tensor& out, const Tensor& block_table,
               const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
               double scale, int64_t high, int64_t low_bits, int64_t sliding_window) {
  const AttentionCall call = check_attention(heads_of(query, "query"), kv_cache, heads_of(out, "out"), block_table,
                                             seq_lens, query_start_loc, rotation, scale, high, low_bits, sliding_window);
  run_attention(call.args, call.batch);
}

void write_and_attend(const HeadRows& query, const HeadRows& key, const HeadRows& value, const Tensor& kv_cache,
                      const HeadRows& out, const Tensor& slot_mapping, const Tensor& block_table,
                      const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
                      double scale, int64_t high, int64_t low_bits, int64_t sliding_window) {
  KVWriteArgs writes = check_write(key, value, kv_cache, slot_mapping, rotation, high, low_bits);
  AttentionCall call = check_attention(query, kv_cache, out, block_table, seq_lens, query_start_loc, rotation, scale,
                                       high, low_bits, sliding_window);
  const int64_t tokens = slot_mapping.size(0);
  if (write_their_own(call, writes, tokens)) {
    call.batch.writes = &writes;
  } else {
    write_tokens(writes, tokens);
  }
  run_attention(call.args, call.batch);
}

void kv_write_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                        const Tensor& out, const Tensor& slot_mapping, const Tensor& block_table,
                        const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
                        double scale, int64_t high, int64_t low_bits, int64_t sliding_window) {
  write_and_attend(heads_of(query, "query"), heads_of(key, "key"), heads_of(value, "value"), kv_cache,
                   heads_of(out, "out"), slot_mapping, block_table, seq_lens, query_start_loc, rotation, scale, high,
                   low_bits, sliding_window);
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
