// torch.ops.resq.quantize_pack, rms_norm_quantize, silu_mul_quantize, quantize_activation and hadamard on CUDA tensors:
// checks, outputs from torch's allocator, one launch. Nothing here waits for the device, so all of it can be captured.
#include <torch/csrc/stable/library.h>

#include "op_quantize.h"
#include "quantize_plan.h"
#include "torch_checks.h"

namespace resq::cuda {
namespace {

using Ints = std::vector<int64_t>;
using Quantized = std::tuple<Tensor, Tensor, Tensor>;

// Order of the dense factor; its pointer goes to `args`.
int64_t dense_order(const std::optional<Tensor>& dense, const Tensor& x, int64_t groups, int64_t columns) {
  if (!groups) return 1;
  if (groups < 0 || columns % groups)
    check(false, "hadamard_groups = " + std::to_string(groups) + " does not divide " + std::to_string(columns) + " columns");
  int64_t k = 1;
  if (dense) {
    check(dense->dim() == 2 && dense->size(0) == dense->size(1), "hadamard_k must be a square matrix");
    check_dtype(*dense, ScalarType::Float, "hadamard_k", "float32");
    check_contiguous(*dense, "hadamard_k");
    check_device(*dense, x, "hadamard_k");
    k = dense->size(0);
  }
  const int64_t n = columns / groups, power = k > 0 && n % k == 0 ? n / k : 0;
  if (power <= 0 || power & (power - 1))
    check(false, "a Hadamard block of " + std::to_string(n) + " columns is not hadamard_k's order " + std::to_string(k) +
                     " times a power of two");
  check(k == 1 || k % 4 == 0, "hadamard_k must have an order that divides by 4");
  return k;
}

void set_input(QuantizeArgs& args, const Tensor& x, DType dtype, const std::optional<Tensor>& dense) {
  const int64_t size = element_size(dtype);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.rows = static_cast<int32_t>(x.size(0));
  args.aligned = aligned16(args.x, args.x_stride * size) && args.columns * size % 16 == 0;
  args.dense = dense && args.hadamard_k > 1 ? static_cast<const float*>(dense->const_data_ptr()) : nullptr;
}

void check_shared(int64_t wanted, const QuantizeArgs& args) {
  const int64_t limit = shared_memory_limit();
  if (wanted > limit)
    check(false, "a row of " + std::to_string(args.columns) + " columns needs " + std::to_string(wanted) +
                     " bytes of shared memory, but this GPU has " + std::to_string(limit) +
                     "; quantize the model with more hadamard_groups, or serve with a higher tensor-parallel degree");
}

Quantized outputs(QuantizeArgs& args, const Tensor& x, int64_t rows) {
  Tensor codes = torch::stable::new_empty(x, {rows, args.row_bytes}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, {rows, args.scale_groups}, ScalarType::Float);
  Tensor zero = torch::stable::new_empty(x, {rows, args.scale_groups}, ScalarType::Int);
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zero = static_cast<int32_t*>(zero.mutable_data_ptr());
  return {codes, scale, zero};
}

Quantized run(QuantizeArgs& args, const Tensor& x, DType dtype, const char* op) {
  const OnDevice device(x);
  Quantized result = outputs(args, x, x.size(0));
  if (!args.rows) return result;
  if (args.hadamard_n > 1 || args.silu_mul) {
    check_shared(hadamard_shared(args), args);
    check_launch(launch_hadamard(args, dtype, device.stream()), op);
  } else {
    check_shared(quantize_shared(args, dtype), args);
    check_launch(launch_quantize(args, dtype, device.stream()), op);
  }
  return result;
}

Quantized quantize(const Tensor& x, const Ints& segments, const Ints& group_bits, int64_t hadamard_groups,
                   const std::optional<Tensor>& hadamard_k, int64_t weight_group, bool nibbles, Order order, bool silu_mul,
                   const char* op) {
  const ActivationPlan plan = make_activation_plan(segments, group_bits, weight_group, nibbles);
  const Tensor rows = rows_of(x, plan.columns * (silu_mul ? 2 : 1), silu_mul ? "gate_up" : "x");
  const DType dtype = float_dtype(rows, "x");
  const int64_t k = dense_order(hadamard_k, rows, hadamard_groups, plan.columns);
  QuantizeArgs args = make_quantize_args(plan, hadamard_groups, k, order);
  set_input(args, rows, dtype, hadamard_k);
  args.silu_mul = silu_mul;
  return run(args, rows, dtype, op);
}

}  // namespace

Quantized quantize_pack(const Tensor& x, Ints segments, Ints group_bits, int64_t hadamard_groups,
                        const std::optional<Tensor>& hadamard_k, int64_t weight_group, bool nibbles) {
  return quantize(x, segments, group_bits, hadamard_groups, hadamard_k, weight_group, nibbles, Order::parts, false,
                  "quantize_pack");
}

namespace {

Quantized silu_mul_quantize(const Tensor& gate_up, Ints segments, Ints group_bits, int64_t hadamard_groups,
                            const std::optional<Tensor>& hadamard_k, int64_t weight_group, bool nibbles) {
  return quantize(gate_up, segments, group_bits, hadamard_groups, hadamard_k, weight_group, nibbles, Order::parts, true,
                  "silu_mul_quantize");
}

Quantized quantize_activation(const Tensor& x, Ints segments, Ints group_bits, int64_t hadamard_groups,
                              const std::optional<Tensor>& hadamard_k) {
  return quantize(x, segments, group_bits, hadamard_groups, hadamard_k, 0, false, Order::columns, false,
                  "quantize_activation");
}

Quantized rms_norm_quantize(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double epsilon,
                            Ints segments, Ints group_bits, int64_t weight_group, bool nibbles) {
  const ActivationPlan plan = make_activation_plan(segments, group_bits, weight_group, nibbles);
  const Tensor rows = rows_of(x, plan.columns, "x");
  const DType dtype = float_dtype(rows, "x");
  QuantizeArgs args = make_quantize_args(plan, 0, 1, Order::parts);
  set_input(args, rows, dtype, std::nullopt);
  check_shape(weight, {plan.columns}, "weight");
  check_contiguous(weight, "weight");
  check_device(weight, rows, "weight");
  check(weight.scalar_type() == rows.scalar_type(), "weight must have x's type");
  args.weight = weight.const_data_ptr();
  args.epsilon = static_cast<float>(epsilon);
  args.aligned = args.aligned && aligned16(args.weight, 0);
  if (residual) {
    check_shape(*residual, {rows.size(0), plan.columns}, "residual");
    check_device(*residual, rows, "residual");
    check(residual->scalar_type() == rows.scalar_type(), "residual must have x's type");
    check(residual->stride(1) == 1, "residual must have unit stride between columns");
    args.residual = residual->mutable_data_ptr();
    args.residual_stride = residual->stride(0);
    args.aligned = args.aligned && aligned16(args.residual, args.residual_stride * element_size(dtype));
  }
  return run(args, rows, dtype, "rms_norm_quantize");
}

Tensor hadamard(const Tensor& x, int64_t groups, const std::optional<Tensor>& hadamard_k) {
  check(x.dim() > 0 && groups > 0, "hadamard needs at least one column and one group");
  const DType dtype = float_dtype(x, "x");
  const Tensor whole = torch::stable::contiguous(x);
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t k = dense_order(hadamard_k, whole, groups, columns);
  QuantizeArgs args = make_hadamard_args(columns, groups, k);
  const OnDevice device(whole);
  Tensor out = torch::stable::new_empty(whole, whole.sizes());
  args.x = whole.const_data_ptr();
  args.x_stride = columns;
  args.rows = static_cast<int32_t>(columns ? whole.numel() / columns : 0);
  args.aligned = aligned16(args.x, columns * element_size(dtype)) && args.columns * element_size(dtype) % 16 == 0;
  args.dense = k > 1 ? static_cast<const float*>(hadamard_k->const_data_ptr()) : nullptr;
  args.out = out.mutable_data_ptr();
  if (!args.rows) return out;
  check_shared(hadamard_shared(args), args);
  check_launch(launch_hadamard(args, dtype, device.stream()), "hadamard");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resq, CUDA, m) {
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("hadamard", TORCH_BOX(&hadamard));
}

}  // namespace resq::cuda
