// The ops of torch.ops.resq on CPU tensors. Schemas and shapes: bindings.cpp and resq_vllm/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace resq {

using torch::stable::Tensor;

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
              const std::optional<Tensor>& bias, int64_t n, std::vector<int64_t> segments,
              std::vector<int64_t> group_bits, int64_t hadamard_groups, const std::optional<Tensor>& hadamard_k,
              int64_t weight_group);

// The same with the plan as words (cpu/plan.h) and N from the scales: converting lists takes up to half of a call.
Tensor linear_planned(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                      const std::optional<Tensor>& bias, const Tensor& plan, const std::optional<Tensor>& hadamard_k);

// RMSNorm of x, or of x + residual, then a layer; the second result is the sum (empty without residual).
std::tuple<Tensor, Tensor> norm_linear(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                                       double epsilon, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                                       const std::optional<Tensor>& bias, const Tensor& plan,
                                       const std::optional<Tensor>& hadamard_k);

// SiLU·mul of x = [gate | up], then a layer.
Tensor silu_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                   const std::optional<Tensor>& bias, const Tensor& plan, const std::optional<Tensor>& hadamard_k);

// A layer, norm_linear with the residual, silu_linear: a decoder from its attention's output to the end of its MLP.
std::tuple<Tensor, Tensor> decoder_mlp(
    const Tensor& x, const Tensor& residual,
    const Tensor& o_packed, const Tensor& o_scales, const Tensor& o_wsum, const std::optional<Tensor>& o_bias,
    const Tensor& o_plan, const std::optional<Tensor>& o_hadamard_k,
    const Tensor& norm_weight, double norm_epsilon,
    const Tensor& up_packed, const Tensor& up_scales, const Tensor& up_wsum, const std::optional<Tensor>& up_bias,
    const Tensor& up_plan, const std::optional<Tensor>& up_hadamard_k,
    const Tensor& down_packed, const Tensor& down_scales, const Tensor& down_wsum, const std::optional<Tensor>& down_bias,
    const Tensor& down_plan, const std::optional<Tensor>& down_hadamard_k);

// decoder_mlp, then norm_linear for the next decoder layer.
std::tuple<Tensor, Tensor> between_attentions(
    const Tensor& x, const Tensor& residual,
    const Tensor& o_packed, const Tensor& o_scales, const Tensor& o_wsum, const std::optional<Tensor>& o_bias,
    const Tensor& o_plan, const std::optional<Tensor>& o_hadamard_k,
    const Tensor& norm_weight, double norm_epsilon,
    const Tensor& up_packed, const Tensor& up_scales, const Tensor& up_wsum, const std::optional<Tensor>& up_bias,
    const Tensor& up_plan, const std::optional<Tensor>& up_hadamard_k,
    const Tensor& down_packed, const Tensor& down_scales, const Tensor& down_wsum, const std::optional<Tensor>& down_bias,
    const Tensor& down_plan, const std::optional<Tensor>& down_hadamard_k,
    const Tensor& next_weight, double next_epsilon,
    const Tensor& qkv_packed, const Tensor& qkv_scales, const Tensor& qkv_wsum, const std::optional<Tensor>& qkv_bias,
    const Tensor& qkv_plan, const std::optional<Tensor>& qkv_hadamard_k);

std::tuple<Tensor, Tensor> pack_weight(const std::optional<Tensor>& low, const std::optional<Tensor>& high,
                                       int64_t low_bits, int64_t n, std::vector<int64_t> segments, int64_t weight_group);

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, std::vector<int64_t> segments,
                                                       std::vector<int64_t> group_bits, int64_t hadamard_groups,
                                                       const std::optional<Tensor>& hadamard_k);

Tensor hadamard(const Tensor& x, int64_t groups, const std::optional<Tensor>& hadamard_k);

// x·Wᵀ of few rows in bfloat16, W as it lies in the checkpoint.
Tensor linear_bf16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

void kv_write(const Tensor& key, const Tensor& value, const Tensor& kv_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& rotation, int64_t high, int64_t low_bits);

void attention(const Tensor& query, const Tensor& kv_cache, const Tensor& out, const Tensor& block_table,
               const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
               double scale, int64_t high, int64_t low_bits, int64_t sliding_window);

// kv_write, then attention of the same tokens: one call a layer.
void kv_write_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                        const Tensor& out, const Tensor& slot_mapping, const Tensor& block_table,
                        const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& rotation,
                        double scale, int64_t high, int64_t low_bits, int64_t sliding_window);

// Rotary embedding, in place, of the first `heads` heads of every row of x [T, ...].
void rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin_cache, int64_t heads);

// Decoder layers from the first one's q, k, v to the last one's between_attentions or decoder_mlp: a number for them.
// weights: the tensors of those, layer by layer; layouts: high, low_bits and sliding_window of every layer's cache.
int64_t decoder_stack(const Tensor& cos_sin_cache, std::vector<std::optional<Tensor>> weights,
                      std::vector<double> epsilons, std::vector<Tensor> kv_caches,
                      std::vector<std::optional<Tensor>> rotations, std::vector<double> scales,
                      std::vector<int64_t> layouts, int64_t query_heads);

// The results of its last layer; writes to its caches.
std::tuple<Tensor, Tensor> run_decoder_stack(int64_t stack, const Tensor& qkv, const Tensor& residual,
                                             const Tensor& positions, const Tensor& slot_mapping,
                                             const Tensor& block_table, const Tensor& seq_lens,
                                             const Tensor& query_start_loc);

// Lets go of the tensors. Its number may be unknown.
void drop_decoder_stack(int64_t stack);

// Which kernels attend for a model of `dtype` ("bfloat16", "float16" or "float32"), in words.
std::string attention_kernels(std::string dtype, int64_t head_dim, int64_t high, int64_t low_bits);

// Asks for 2 MiB pages under a tensor, whole ones only.
void prefer_huge_pages(const Tensor& x);

}  // namespace resq
