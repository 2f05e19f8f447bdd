#include "kv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "attention_kernels.h"
#include "attention_tasks.h"
#include "isa.h"

namespace resq {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

KVWriteArgs write_args(const HeadRows& key, const HeadRows& value, const PackedCache& cache, const Slots& slots,
                       const float* rotation) {
  check(value.dtype == key.dtype, "value must have key's dtype");
  check(key.heads == cache.heads, [&] {
    return "key has " + std::to_string(key.heads) + " heads, but the cache has " + std::to_string(cache.heads);
  });
  check_like(value, key, "value", "key");
  KVWriteArgs args{};
  args.page = cache.page;
  args.dtype = key.dtype;
  args.rotation = rotation;
  args.key = key.data;
  args.value = value.data;
  args.key_token_stride = key.token_stride;
  args.key_head_stride = key.head_stride;
  args.value_token_stride = value.token_stride;
  args.value_head_stride = value.head_stride;
  args.cache = cache.data;
  args.block_stride = cache.block_stride;
  args.head_stride = cache.head_stride;
  args.slots = slots.data;
  args.heads = key.heads;
  return args;
}

AttentionArgs attention_args(const HeadRows& query, const PackedCache& cache, const HeadRows& out,
                             const Sequences& sequences, const Attending& how) {
  check_like(out, query, "out", "query");
  check(query.head_dim == cache.page.head_dim, "query must have the cache's head_dim");
  check(query.heads % cache.heads == 0, [&] {
    return "query's " + std::to_string(query.heads) + " heads are no multiple of the cache's " +
           std::to_string(cache.heads) + " kv heads";
  });
  AttentionArgs args{};
  args.page = cache.page;
  args.query = query.data;
  args.out = out.data;
  args.query_dtype = query.dtype;
  args.out_dtype = out.dtype;
  args.query_token_stride = query.token_stride;
  args.query_head_stride = query.head_stride;
  args.out_token_stride = out.token_stride;
  args.out_head_stride = out.head_stride;
  args.cache = cache.data;
  args.block_stride = cache.block_stride;
  args.head_stride = cache.head_stride;
  args.block_table = sequences.block_table;
  args.block_table_stride = sequences.table_stride;
  args.rotation = how.rotation;
  args.scale = how.scale;
  args.group = query.heads / cache.heads;
  args.window = how.window;
  return args;
}

AttentionBatch attention_batch(const PackedCache& cache, const Sequences& sequences) {
  return {sequences.count, cache.heads, sequences.seq_lens, sequences.query_start_loc, nullptr};
}

// Whether the sequences have one new token each, to be written where their own attention reads it. Not where a page
// becomes full: vLLM may have shared it already, as a cached prefix, with another sequence of the batch.
bool write_their_own(const Sequences& sequences, const Slots& slots, int64_t page) {
  if (slots.count != sequences.count || sequences.query_start_loc[0] != 0) return false;
  for (int64_t s = 0; s < slots.count; ++s) {
    const int64_t position = sequences.seq_lens[s] - 1, offset = position % page;
    if (sequences.query_start_loc[s + 1] != s + 1 || offset == page - 1) return false;
    const int64_t block = sequences.block_table[s * sequences.table_stride + position / page];
    if (slots.data[s] != block * page + offset) return false;
  }
  return true;
}

}  // namespace

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

PackedCache packed_cache(const Tensor& kv_cache, int64_t head_dim, int64_t high, int64_t low_bits) {
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
  return {p,
          static_cast<uint8_t*>(kv_cache.mutable_data_ptr()),
          kv_cache.size(0),
          kv_cache.size(1),
          kv_cache.stride(0),
          kv_cache.stride(1)};
}

Attending attending(const std::optional<Tensor>& rotation, int64_t head_dim, double scale, int64_t sliding_window) {
  check(sliding_window == -1 || sliding_window > 0, "sliding_window must be positive, or -1 for none");
  Attending how{nullptr, static_cast<float>(scale), sliding_window};
  if (!rotation) return how;
  check_dtype(*rotation, ScalarType::Float, "rotation", "float32");
  check_shape(*rotation, {head_dim, head_dim}, "rotation");
  check_contiguous(*rotation, "rotation");
  how.rotation = static_cast<const float*>(rotation->const_data_ptr());
  return how;
}

Slots slots_of(const Tensor& slot_mapping) {
  check_dtype(slot_mapping, ScalarType::Long, "slot_mapping", "int64");
  check(slot_mapping.dim() == 1, "slot_mapping must be one-dimensional and no longer than key");
  check_contiguous(slot_mapping, "slot_mapping");
  return {static_cast<const int64_t*>(slot_mapping.const_data_ptr()), slot_mapping.size(0)};
}

Sequences sequences_of(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc) {
  check_dtype(block_table, ScalarType::Int, "block_table", "int32");
  check_dtype(seq_lens, ScalarType::Int, "seq_lens", "int32");
  check_dtype(query_start_loc, ScalarType::Int, "query_start_loc", "int32");
  const int64_t count = seq_lens.numel();
  check(block_table.dim() == 2 && block_table.size(0) >= count &&
            (block_table.size(1) <= 1 || block_table.stride(1) == 1),
        "block_table must have shape [sequences, blocks] with contiguous rows");
  check(query_start_loc.dim() == 1 && query_start_loc.size(0) > count && query_start_loc.is_contiguous() &&
            seq_lens.is_contiguous(),
        "query_start_loc must hold one more entry than seq_lens, both contiguous");
  return {static_cast<const int32_t*>(block_table.const_data_ptr()),
          static_cast<const int32_t*>(seq_lens.const_data_ptr()),
          static_cast<const int32_t*>(query_start_loc.const_data_ptr()),
          count,
          block_table.stride(0),
          block_table.size(1)};
}

void check_slots(const Slots& slots, const PackedCache& cache, int64_t tokens) {
  check(slots.count <= tokens, "slot_mapping must be one-dimensional and no longer than key");
  const int64_t all = cache.blocks * cache.page.tokens;
  for (int64_t t = 0; t < slots.count; ++t)
    check(slots.data[t] < all, [&] {
      return "slot_mapping names slot " + std::to_string(slots.data[t]) + ", but the cache has only " +
             std::to_string(all);
    });
}

void check_sequences(const Sequences& sequences, const PackedCache& cache, int64_t window, int64_t tokens) {
  const int64_t page = cache.page.tokens;
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t first = sequences.query_start_loc[s], end = sequences.query_start_loc[s + 1];
    const int64_t length = sequences.seq_lens[s];
    const auto name = [&] { return "sequence " + std::to_string(s); };
    if (first == end) continue;
    check(0 <= first && first < end && end <= tokens, [&] {
      return name() + ": query_start_loc is not ascending within query's " + std::to_string(tokens) + " tokens";
    });
    check(end - first <= length,
          [&] { return name() + " has more new tokens than its seq_lens " + std::to_string(length); });
    const int64_t blocks = (length + page - 1) / page;
    check(blocks <= sequences.table_blocks,
          [&] { return name() + ": block_table is too short for its length " + std::to_string(length); });
    // Blocks that fell out of the window may have been freed, and their entries then name nothing.
    const int64_t oldest = window < 0 ? 0 : std::max<int64_t>(0, length - (end - first) - window + 1);
    for (int64_t b = oldest / page; b < blocks; ++b) {
      const int64_t block = sequences.block_table[s * sequences.table_stride + b];
      check(0 <= block && block < cache.blocks, [&] {
        return name() + ": block_table names block " + std::to_string(block) + " of " + std::to_string(cache.blocks);
      });
    }
  }
}

void write_kv(const HeadRows& key, const HeadRows& value, const PackedCache& cache, const Slots& slots,
              const float* rotation) {
  KVWriteArgs args = write_args(key, value, cache, slots, rotation);
  write_tokens(args, slots.count);
}

void attend(const HeadRows& query, const PackedCache& cache, const HeadRows& out, const Sequences& sequences,
            const Attending& how) {
  run_attention(attention_args(query, cache, out, sequences, how), attention_batch(cache, sequences));
}

void write_and_attend(const HeadRows& query, const HeadRows& key, const HeadRows& value, const PackedCache& cache,
                      const HeadRows& out, const Slots& slots, const Sequences& sequences, const Attending& how) {
  KVWriteArgs writes = write_args(key, value, cache, slots, how.rotation);
  const AttentionArgs args = attention_args(query, cache, out, sequences, how);
  AttentionBatch batch = attention_batch(cache, sequences);
  if (write_their_own(sequences, slots, cache.page.tokens)) {
    batch.writes = &writes;
  } else {
    write_tokens(writes, slots.count);
  }
  run_attention(args, batch);
}

}  // namespace resq
