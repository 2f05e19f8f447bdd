#include "layer.h"

#include <torch/csrc/stable/ops.h>

namespace resq {

Rows rows_of(const Tensor& x, int64_t columns, const char* name) {
  const DType dtype = float_dtype(x, name);
  const int64_t last = x.dim() - 1;
  if (last < 0 || x.size(last) != columns)
    check(false, std::string(name) + " must have shape [..., " + std::to_string(columns) + "], not " + shape_of(x));
  int64_t count = 1;
  for (int64_t i = 0; i < last; ++i) count *= x.size(i);
  const bool plain = columns == 1 || x.stride(last) == 1;
  if (last == 1 && plain) return {x, count, x.stride(0), dtype};
  if (last == 0 && plain) return {x, 1, columns, dtype};
  return {torch::stable::contiguous(x), count, columns, dtype};
}

HadamardArgs hadamard_args(int64_t groups, const std::optional<Tensor>& dense, int64_t columns) {
  HadamardArgs h{groups, 1, nullptr};
  if (!groups) return h;
  if (groups < 0 || columns % groups)
    check(false, "hadamard_groups = " + std::to_string(groups) + " does not divide " + std::to_string(columns) +
                     " columns");
  const int64_t n = columns / groups;
  if (dense) {
    check(dense->dim() == 2 && dense->size(0) == dense->size(1), "hadamard_k must be a square matrix");
    check_dtype(*dense, ScalarType::Float, "hadamard_k", "float32");
    check_contiguous(*dense, "hadamard_k");
    h.k = dense->size(0);
    h.dense = static_cast<const float*>(dense->const_data_ptr());
  }
  const int64_t power = h.k > 0 && n % h.k == 0 ? n / h.k : 0;
  if (power <= 0 || power & (power - 1))
    check(false, "a Hadamard block of " + std::to_string(n) + " columns is not hadamard_k's order " +
                     std::to_string(h.k) + " times a power of two");
  return h;
}

QuantizeArgs quantize_args(const Rows& rows, const LinearPlan& plan, const std::optional<Tensor>& hadamard_k) {
  QuantizeArgs q{};
  q.x = rows.tensor.const_data_ptr();
  q.dtype = rows.dtype;
  q.row_stride = rows.stride;
  q.plan = plan.view();
  q.hadamard = hadamard_args(plan.hadamard_groups, hadamard_k, plan.columns);
  return q;
}

namespace {

// The plan whose superblocks fill `packed`: the width of the low weights is not an argument, but it shows in the size.
std::shared_ptr<const LinearPlan> plan_of(const Layer& layer) {
  const auto& [packed, scales, wsum, bias, n, words, count, hadamard_k] = layer;
  check(n > 0, "n must be positive");
  check_dtype(packed, ScalarType::Byte, "packed", "uint8");
  check_dtype(scales, ScalarType::Float, "scales", "float32");
  check_dtype(wsum, ScalarType::Int, "wsum", "int32");
  check_contiguous(packed, "packed");
  check_contiguous(scales, "scales");
  check_contiguous(wsum, "wsum");
  const int64_t superblocks = (n + kSuperblock - 1) / kSuperblock, bytes = packed.numel();
  std::shared_ptr<const LinearPlan> nibbles = cached_plan(words, count, 4);
  const int64_t expected = superblocks * nibbles->superblock_bytes;
  if (bytes == expected) return nibbles;
  std::shared_ptr<const LinearPlan> plan = cached_plan(words, count, 8);
  if (bytes != superblocks * plan->superblock_bytes)
    check(false, "packed holds " + std::to_string(bytes) + " bytes, but these segments and n = " + std::to_string(n) +
                     " need " + std::to_string(expected) + " (or " +
                     std::to_string(superblocks * plan->superblock_bytes) +
                     " at 8 bit); pack the weight with the same arguments");
  return plan;
}

}  // namespace

BeforeArgs before_args(const BeforeLayer& before, int64_t rows, int64_t columns, const Tensor& x) {
  BeforeArgs args{};
  args.kind = before.kind;
  if (before.kind != Before::rms_norm) return args;
  const auto like_x = [&](const Tensor& t, const char* name) {
    if (t.scalar_type() != x.scalar_type()) check(false, std::string(name) + " must have x's dtype");
    check_contiguous(t, name);
  };
  like_x(*before.weight, "the norm's weight");
  check_shape(*before.weight, {columns}, "the norm's weight");
  args.weight = before.weight->const_data_ptr();
  args.epsilon = static_cast<float>(before.epsilon);
  if (!before.residual) return args;
  like_x(*before.residual, "residual");
  if (before.residual->numel() != rows * columns)
    check(false, "residual must have x's shape " + shape_of(x) + ", not " + shape_of(*before.residual));
  args.residual = before.residual->const_data_ptr();
  args.residual_out = before.residual_out->mutable_data_ptr();
  args.residual_stride = args.residual_out_stride = columns;
  return args;
}

Layer planned_layer(const Tensor& packed, const Tensor& scales, const Tensor& wsum, const std::optional<Tensor>& bias,
                    const Tensor& plan, const std::optional<Tensor>& hadamard_k) {
  check_dtype(plan, ScalarType::Long, "plan", "int64");
  check_contiguous(plan, "plan");
  check(scales.dim() == 2, "scales must have shape [rows, N]");
  return {packed, scales, wsum, bias, scales.size(1), static_cast<const int64_t*>(plan.const_data_ptr()), plan.numel(),
          hadamard_k};
}

CheckedLayer check_layer(const Layer& layer) {
  const auto& [packed, scales, wsum, bias, n, words, count, hadamard_k] = layer;
  CheckedLayer checked{plan_of(layer), {}, {}};
  const LinearPlan& plan = *checked.plan;
  check_shape(scales, {plan.scale_rows, n}, "scales");
  check_shape(wsum, {static_cast<int64_t>(plan.runs.size()), n}, "wsum");
  LinearArgs& args = checked.linear;
  if (bias) {
    check_shape(*bias, {n}, "bias");
    check_contiguous(*bias, "bias");
    args.bias = bias->const_data_ptr();
    args.bias_dtype = float_dtype(*bias, "bias");
  }
  args.plan = plan.view();
  args.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.weight_scale = static_cast<const float*>(scales.const_data_ptr());
  args.weight_sum = static_cast<const int32_t*>(wsum.const_data_ptr());
  args.n = n;
  checked.hadamard = hadamard_args(plan.hadamard_groups, hadamard_k, plan.columns);
  return checked;
}

void run_checked(const CheckedLayer& layer, const RowsAt& x, const BeforeArgs& before, void* out) {
  if (x.count == 0) return;
  check(!before.residual || before.residual_out != before.residual, "the sum must not go where the residual is read");
  QuantizeArgs quantize{};
  quantize.x = x.data;
  quantize.dtype = x.dtype;
  quantize.row_stride = x.stride;
  quantize.before = before;
  quantize.plan = layer.linear.plan;
  quantize.hadamard = layer.hadamard;
  LinearArgs args = layer.linear;
  args.out = out;
  args.out_dtype = x.dtype;
  args.out_stride = args.n;
  run_linear(quantize, args, x.count);
}

Tensor run_layer(const Tensor& x, const Layer& layer, const BeforeLayer& before) {
  const CheckedLayer checked = check_layer(layer);
  const int64_t columns = checked.plan->columns;
  const Rows rows = rows_of(x, before.kind == Before::silu_mul ? 2 * columns : columns, "x");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = layer.n;
  Tensor out = torch::stable::new_empty(x, shape);
  run_checked(checked, {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.stride},
           before_args(before, rows.count, columns, x), out.mutable_data_ptr());
  return out;
}

}  // namespace resq
