// torch.ops.resq.kv_decode on CUDA tensors: one launch, which can be captured.
#include <torch/csrc/stable/library.h>

#include "kv_decode_args.h"
#include "kv_launch.h"
#include "torch_checks.h"

namespace resq::cuda {
namespace {

const int32_t* integers(const Tensor& t, const Tensor& like, const char* name) {
  check_dtype(t, ScalarType::Int, name, "int32");
  check_device(t, like, name);
  check(t.stride(t.dim() - 1) == 1 || t.numel() <= 1, std::string(name) + " must be contiguous in its last dim");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// The strides and pointers of query and output [T, H, head_dim] and cache [blocks, Hkv, 64, C].
void decode(const Tensor& query, const Tensor& cache, Tensor output, const Tensor& block_table, const Tensor& seq_lens,
            const Tensor& query_start_loc, double scale, int64_t high, int64_t window, int64_t max_query_len,
            int64_t splits, const std::optional<Tensor>& workspace) {
  const DType dtype = float_dtype(query, "query");
  check(query.dim() == 3 && output.dim() == 3 && cache.dim() == 4, "kv_decode needs query and output [T, H, head_dim] and "
                                                                   "kv_cache [blocks, Hkv, 64, C]");
  check(dtype != DType::f32 && output.scalar_type() == query.scalar_type(),
        "query and output must be both bfloat16 or both float16");
  check_device(cache, query, "kv_cache"), check_device(output, query, "output");
  const int64_t head_dim = query.size(2), kv_heads = cache.size(1), sequences = seq_lens.size(0);
  check(kv_heads > 0 && query.size(1) % kv_heads == 0, "query must have a multiple of kv_cache's heads");
  KvDecodeArgs a{};
  a.group = static_cast<int32_t>(query.size(1) / kv_heads);
  a.rows = static_cast<int32_t>(max_query_len * a.group);
  check(kv_page_bytes(head_dim, high) == cache.size(2) * cache.size(3) && cache.size(2) == kPageTokens, [&] {
    return "kv_decode has no kernel for heads of " + std::to_string(head_dim) + " dims, " + std::to_string(high) +
           " of them at 8 bits, in pages of " + shape_of(cache);
  });
  check(a.rows >= 1 && a.rows <= kKvDecodeRows, "kv_decode takes 1 to 16 query rows a sequence and kv head");
  check(splits >= 1, "splits must be positive");
  if (sequences == 0 || query.size(0) == 0) return;

  const OnDevice device(query);
  a.query = static_cast<const uint16_t*>(query.const_data_ptr());
  a.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  a.output = static_cast<uint16_t*>(output.mutable_data_ptr());
  a.block_table = integers(block_table, query, "block_table");
  a.seq_lens = integers(seq_lens, query, "seq_lens");
  a.query_start = integers(query_start_loc, query, "query_start_loc");
  a.query_token = query.stride(0), a.query_head = query.stride(1);
  a.output_token = output.stride(0), a.output_head = output.stride(1);
  a.cache_block = cache.stride(0), a.cache_head = cache.stride(1);
  a.table_row = block_table.stride(0);
  check(query.stride(2) == 1 && output.stride(2) == 1 && cache.stride(3) == 1 && cache.stride(2) == cache.size(3),
        "kv_decode needs query and output contiguous in their last dim, and contiguous pages");
  check(aligned16(a.cache, a.cache_block) && a.cache_head % 16 == 0, "pages must begin at multiples of 16 bytes");
  check(aligned16(a.query, 2 * a.query_token) && 2 * a.query_head % 16 == 0,
        "heads of query must begin at multiples of 16 bytes");
  a.scale = static_cast<float>(scale);
  a.half = dtype == DType::f16;
  a.window = static_cast<int32_t>(window);
  a.splits = static_cast<int32_t>(splits);
  a.kv_heads = static_cast<int32_t>(kv_heads);
  if (splits > 1) {
    const int64_t places = sequences * kv_heads * a.rows * splits;
    check(workspace && workspace->numel() * static_cast<int64_t>(workspace->element_size()) >= 4 * places * (head_dim + 1),
          "workspace is too small for these splits");
    check_device(*workspace, query, "workspace");
    a.partial = static_cast<float*>(workspace->mutable_data_ptr());
    a.log_sums = a.partial + places * head_dim;
  }
  check_launch(launch_kv_decode(a, head_dim, sequences, device.stream()), "kv_decode");
}

STABLE_TORCH_LIBRARY_IMPL(resq, CUDA, m) { m.impl("kv_decode", TORCH_BOX(&decode)); }

}  // namespace
}  // namespace resq::cuda
