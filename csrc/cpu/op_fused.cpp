// torch.ops.resq.norm_linear, silu_linear, decoder_mlp and between_attentions: linear layers with what a decoder does to
// their input.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../ops.h"
#include "layer.h"

namespace resq {
namespace {

BeforeLayer norm(const Tensor& weight, double epsilon, const Tensor* residual, Tensor* residual_out) {
  return {Before::rms_norm, &weight, epsilon, residual, residual_out};
}

// Rows of an MLP that are worked on together: at most kMostRows, and so few that gate_up's output stays below the 32 MiB
// from which malloc takes a block from the system and gives it back every time (resq_vllm/memory.py has it keep smaller
// ones). For all 2048 rows of a batch of prompts that is 64 MB in a 1B model, whose page faults were a seventh of the time.
// A buffer of our own, kept between calls, would be 22 MiB that attention and the other layers cannot use.
constexpr int64_t kMostRows = 768, kRowStep = 32, kMostBytes = (int64_t{32} << 20) - (64 << 10);

int64_t rows_at_once(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::clamp(kMostBytes / row_bytes / kRowStep * kRowStep, kRowStep, kMostRows);
  const int64_t parts = (rows + most - 1) / most;
  return parts == 1 ? rows : (rows + parts * kRowStep - 1) / (parts * kRowStep) * kRowStep;
}

// gate_up with the norm before it and down with SiLU before it, some rows at a time.
Tensor run_mlp(const Tensor& x, const Tensor& residual, Tensor& sum, const Tensor& weight, double epsilon,
               const Layer& up, const Layer& down) {
  const int64_t rows = x.dim() == 2 ? x.size(0) : 0;
  const int64_t step = rows ? rows_at_once(rows, up.n * static_cast<int64_t>(x.element_size())) : 0;
  // All at once without views of the rows: a decode step makes five of them in every layer otherwise, 15 µs of a call.
  if (step == rows)
    return run_layer(run_layer(x, up, norm(weight, epsilon, &residual, &sum)), down, {Before::silu_mul});
  if (residual.dim() != 2 || residual.size(0) != rows)
    check(false, "residual must have x's shape " + shape_of(x) + ", not " + shape_of(residual));
  Tensor from = x, streams = residual, out = torch::stable::new_empty(x, {rows, down.n});
  Tensor inner = torch::stable::new_empty(x, {step, up.n});
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const auto part = [&](Tensor& t) { return torch::stable::narrow(t, 0, first, count); };
    const Tensor stream = part(streams), to = part(out), gate_up = torch::stable::narrow(inner, 0, 0, count);
    Tensor total = part(sum);
    run_layer(part(from), up, norm(weight, epsilon, &stream, &total), &gate_up);
    run_layer(gate_up, down, {Before::silu_mul}, &to);
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> norm_linear(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                                       double epsilon, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                                       const std::optional<Tensor>& bias, const Tensor& plan,
                                       const std::optional<Tensor>& hadamard_k) {
  const Layer layer = planned_layer(packed, scales, wsum, bias, plan, hadamard_k);
  if (!residual) return {run_layer(x, layer, norm(weight, epsilon, nullptr, nullptr)), torch::stable::new_empty(x, {0})};
  Tensor sum = torch::stable::new_empty(x, x.sizes());
  Tensor y = run_layer(x, layer, norm(weight, epsilon, &*residual, &sum));
  return {y, sum};
}

Tensor silu_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                   const std::optional<Tensor>& bias, const Tensor& plan, const std::optional<Tensor>& hadamard_k) {
  return run_layer(x, planned_layer(packed, scales, wsum, bias, plan, hadamard_k), {Before::silu_mul});
}

std::tuple<Tensor, Tensor> decoder_mlp(
    const Tensor& x, const Tensor& residual,
    const Tensor& o_packed, const Tensor& o_scales, const Tensor& o_wsum, const std::optional<Tensor>& o_bias,
    const Tensor& o_plan, const std::optional<Tensor>& o_hadamard_k,
    const Tensor& norm_weight, double norm_epsilon,
    const Tensor& up_packed, const Tensor& up_scales, const Tensor& up_wsum, const std::optional<Tensor>& up_bias,
    const Tensor& up_plan, const std::optional<Tensor>& up_hadamard_k,
    const Tensor& down_packed, const Tensor& down_scales, const Tensor& down_wsum, const std::optional<Tensor>& down_bias,
    const Tensor& down_plan, const std::optional<Tensor>& down_hadamard_k) {
  const Tensor attended = run_layer(x, planned_layer(o_packed, o_scales, o_wsum, o_bias, o_plan, o_hadamard_k));
  Tensor sum = torch::stable::new_empty(residual, residual.sizes());
  Tensor y = run_mlp(attended, residual, sum, norm_weight, norm_epsilon,
                     planned_layer(up_packed, up_scales, up_wsum, up_bias, up_plan, up_hadamard_k),
                     planned_layer(down_packed, down_scales, down_wsum, down_bias, down_plan, down_hadamard_k));
  return {y, sum};
}

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
    const Tensor& qkv_plan, const std::optional<Tensor>& qkv_hadamard_k) {
  const auto [y, sum] = decoder_mlp(x, residual, o_packed, o_scales, o_wsum, o_bias, o_plan, o_hadamard_k, norm_weight,
                                    norm_epsilon, up_packed, up_scales, up_wsum, up_bias, up_plan, up_hadamard_k,
                                    down_packed, down_scales, down_wsum, down_bias, down_plan, down_hadamard_k);
  return norm_linear(y, sum, next_weight, next_epsilon, qkv_packed, qkv_scales, qkv_wsum, qkv_bias, qkv_plan,
                     qkv_hadamard_k);
}

}  // namespace resq
