// torch.ops.resq.rope and decoder_layers: a whole stack of decoder layers, attention included, in one call. Between two
// ops of a decode step, Python, torch's dispatcher and its allocator find the caches full of weights: 0.3 to 0.4 ms a
// layer on 2 cores (Zen 4, 1B shape), a fifth of a step.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../ops.h"
#include "isa.h"
#include "kv.h"

namespace resq {
namespace {

constexpr int64_t kRopeValues = 1 << 15;  // that a thread should have; a decode step's tokens stay on one
constexpr size_t kMlpTensors = 19, kLayerTensors = 26;  // a layer's without and with the next one's norm and qkv

// The heads [first, first + heads) of every row of x.
HeadRows heads_from(const Tensor& x, int64_t tokens, int64_t first, int64_t heads, int64_t head_dim, DType dtype) {
  uint8_t* data = static_cast<uint8_t*>(x.mutable_data_ptr());
  return {data + first * head_dim * (dtype == DType::f32 ? 4 : 2), dtype, tokens, heads, head_dim, x.stride(0), head_dim};
}

void check_positions(const Tensor& positions, int64_t tokens, int64_t most) {
  check_dtype(positions, ScalarType::Long, "positions", "int64");
  check_shape(positions, {tokens}, "positions");
  check_contiguous(positions, "positions");
  const int64_t* at = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    check(0 <= at[t] && at[t] < most, [&] {
      return "positions names " + std::to_string(at[t]) + ", but cos_sin_cache ends before " + std::to_string(most);
    });
}

void turn(const Tensor& x, const Tensor& positions, const Tensor& cos_sin_cache, int64_t heads) {
  const int64_t tokens = x.size(0), head_dim = cos_sin_cache.size(1);
  RopeArgs args{x.mutable_data_ptr(), float_dtype(x, "x"), x.stride(0), heads, head_dim, cos_sin_cache.const_data_ptr(),
                static_cast<const int64_t*>(positions.const_data_ptr())};
  const int64_t grain = std::max<int64_t>(1, kRopeValues / std::max<int64_t>(1, heads * head_dim));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { kernels().rope(args, begin, end); });
}

void check_rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin_cache, int64_t heads) {
  check(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must have shape [tokens, columns] with contiguous rows");
  check(cos_sin_cache.dim() == 2 && cos_sin_cache.is_contiguous() && cos_sin_cache.size(1) % 2 == 0 &&
            0 < cos_sin_cache.size(1) && cos_sin_cache.size(1) <= kMaxHeadDim,
        "cos_sin_cache must have shape [positions, head_dim] and be contiguous, with an even head_dim of at most 512");
  check(cos_sin_cache.scalar_type() == x.scalar_type(), "cos_sin_cache must have x's dtype");
  check(0 < heads && heads * cos_sin_cache.size(1) <= x.size(1), [&] {
    return "x has " + std::to_string(x.size(1)) + " columns, too few for " + std::to_string(heads) + " heads of " +
           std::to_string(cos_sin_cache.size(1));
  });
  check_positions(positions, x.size(0), cos_sin_cache.size(0));
}

// Whether a layer's tensor i may be missing: bias and hadamard_k of o, gate_up, down and qkv.
bool may_lack(size_t i) {
  constexpr size_t kFirst[] = {0, 7, 13, 20};
  return std::any_of(std::begin(kFirst), std::end(kFirst), [&](size_t f) { return i == f + 3 || i == f + 5; });
}

// q, k, v of the next layer (or, after the last layer, its MLP's output) and the residual stream.
std::tuple<Tensor, Tensor> after_attention(const Tensor& x, const Tensor& residual, const std::optional<Tensor>* w,
                                           const double* epsilon, bool ends_in_mlp) {
  if (ends_in_mlp)
    return decoder_mlp(x, residual, *w[0], *w[1], *w[2], w[3], *w[4], w[5], *w[6], epsilon[0], *w[7], *w[8], *w[9],
                       w[10], *w[11], w[12], *w[13], *w[14], *w[15], w[16], *w[17], w[18]);
  return between_attentions(x, residual, *w[0], *w[1], *w[2], w[3], *w[4], w[5], *w[6], epsilon[0], *w[7], *w[8], *w[9],
                            w[10], *w[11], w[12], *w[13], *w[14], *w[15], w[16], *w[17], w[18], *w[19], epsilon[1],
                            *w[20], *w[21], *w[22], w[23], *w[24], w[25]);
}

}  // namespace

void rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin_cache, int64_t heads) {
  check_rope(x, positions, cos_sin_cache, heads);
  turn(x, positions, cos_sin_cache, heads);
}

std::tuple<Tensor, Tensor> decoder_layers(const Tensor& qkv, const Tensor& residual, const Tensor& positions,
                                          const Tensor& cos_sin_cache, std::vector<std::optional<Tensor>> weights,
                                          std::vector<double> epsilons, std::vector<Tensor> kv_caches,
                                          std::vector<std::optional<Tensor>> rotations, std::vector<double> scales,
                                          std::vector<int64_t> layouts, const Tensor& slot_mapping,
                                          const Tensor& block_table, const Tensor& seq_lens,
                                          const Tensor& query_start_loc, int64_t query_heads) {
  const size_t layers = kv_caches.size(), rest = weights.size() % kLayerTensors;
  const bool ends_in_mlp = rest == kMlpTensors;
  check(layers > 0 && (rest == 0 || ends_in_mlp) && weights.size() / kLayerTensors + ends_in_mlp == layers &&
            epsilons.size() == 2 * layers - ends_in_mlp && rotations.size() == layers && scales.size() == layers &&
            layouts.size() == 3 * layers,
        "weights, epsilons, rotations, scales and layouts must be those of as many layers as there are kv_caches");
  for (size_t i = 0; i < weights.size(); ++i)
    check(weights[i].has_value() || may_lack(i % kLayerTensors),
          [&] { return "weights[" + std::to_string(i) + "] is missing"; });
  check(kv_caches[0].dim() == 4, "kv_caches must have shape [blocks, heads, N, C]");
  const int64_t kv_heads = kv_caches[0].size(1);
  check_rope(qkv, positions, cos_sin_cache, query_heads + kv_heads);
  const int64_t tokens = qkv.size(0), head_dim = cos_sin_cache.size(1);
  const DType dtype = float_dtype(qkv, "qkv");

  // The stack's input belongs to the caller; rope works in place.
  Tensor rows = torch::stable::clone(qkv), stream = residual;
  const Tensor attended = torch::stable::new_empty(qkv, {tokens, query_heads * head_dim});
  const HeadRows out = heads_from(attended, tokens, 0, query_heads, head_dim, dtype);
  for (size_t i = 0; i < layers; ++i) {
    check(rows.size(1) == (query_heads + 2 * kv_heads) * head_dim, [&] {
      return "q, k and v of layer " + std::to_string(i) + " have " + std::to_string(rows.size(1)) + " columns, not " +
             std::to_string((query_heads + 2 * kv_heads) * head_dim);
    });
    turn(rows, positions, cos_sin_cache, query_heads + kv_heads);
    const auto part = [&](int64_t first, int64_t heads) { return heads_from(rows, tokens, first, heads, head_dim, dtype); };
    write_and_attend(part(0, query_heads), part(query_heads, kv_heads), part(query_heads + kv_heads, kv_heads),
                     kv_caches[i], out, slot_mapping, block_table, seq_lens, query_start_loc, rotations[i], scales[i],
                     layouts[3 * i], layouts[3 * i + 1], layouts[3 * i + 2]);
    std::tie(rows, stream) = after_attention(attended, stream, weights.data() + kLayerTensors * i,
                                             epsilons.data() + 2 * i, ends_in_mlp && i + 1 == layers);
  }
  return {rows, stream};
}

}  // namespace resq
