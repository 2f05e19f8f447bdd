// torch.ops.resq.norm_linear, silu_linear, decoder_mlp and between_attentions: linear layers with what a decoder does to
// their input.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "mlp.h"

namespace resq {
namespace {

BeforeLayer norm(const Tensor& weight, double epsilon, const Tensor* residual, Tensor* residual_out) {
  return {Before::rms_norm, &weight, epsilon, residual, residual_out};
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
  const CheckedLayer up = check_layer(planned_layer(up_packed, up_scales, up_wsum, up_bias, up_plan, up_hadamard_k));
  const CheckedLayer down =
      check_layer(planned_layer(down_packed, down_scales, down_wsum, down_bias, down_plan, down_hadamard_k));
  check_mlp(up, down);
  const Rows rows = rows_of(attended, up.plan->columns, "x");
  Tensor sum = torch::stable::new_empty(residual, residual.sizes());
  const BeforeArgs before = before_args(norm(norm_weight, norm_epsilon, &residual, &sum), rows.count, up.plan->columns,
                                        attended);
  std::vector<int64_t> shape(attended.sizes().begin(), attended.sizes().end());
  shape.back() = down.linear.n;
  Tensor y = torch::stable::new_empty(attended, shape);
  const int64_t step = mlp_rows_at_once(rows.count, up.linear.n * bytes_of(rows.dtype));
  Tensor inner = torch::stable::new_empty(attended, {step, up.linear.n});
  run_mlp(up, down, {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.stride}, before,
          inner.mutable_data_ptr(), y.mutable_data_ptr());
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
