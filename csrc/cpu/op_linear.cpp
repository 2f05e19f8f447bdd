// torch.ops.resq.linear, linear_planned, quantize_activation and hadamard: checks, then the kernels.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "isa.h"
#include "linear.h"
#include "plan.h"
#include "tensors.h"

namespace resq {
namespace {

// x [..., K] as rows with unit stride between columns.
struct Rows {
  Tensor tensor;
  int64_t count, stride;
  DType dtype;
};

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

Tensor empty(std::vector<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, shape, dtype);
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

// The plan whose superblocks fill `packed`: the width of the low weights is not an argument, but it shows in the size.
const LinearPlan& plan_of_packed(const Tensor& packed, int64_t n, const int64_t* words, int64_t count) {
  const int64_t superblocks = (n + kSuperblock - 1) / kSuperblock, bytes = packed.numel();
  const LinearPlan& nibbles = cached_plan(words, count, 4);
  const int64_t expected = superblocks * nibbles.superblock_bytes;
  if (bytes == expected) return nibbles;
  const LinearPlan& plan = cached_plan(words, count, 8);
  if (bytes != superblocks * plan.superblock_bytes)
    check(false, "packed holds " + std::to_string(bytes) + " bytes, but these segments and n = " + std::to_string(n) +
                     " need " + std::to_string(expected) + " (or " +
                     std::to_string(superblocks * plan.superblock_bytes) +
                     " at 8 bit); pack the weight with the same arguments");
  return plan;
}

Tensor run(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
           const std::optional<Tensor>& bias, int64_t n, const int64_t* words, int64_t count,
           const std::optional<Tensor>& hadamard_k) {
  check(n > 0, "n must be positive");
  check_dtype(packed, ScalarType::Byte, "packed", "uint8");
  check_dtype(scales, ScalarType::Float, "scales", "float32");
  check_dtype(wsum, ScalarType::Int, "wsum", "int32");
  check_contiguous(packed, "packed");
  check_contiguous(scales, "scales");
  check_contiguous(wsum, "wsum");
  const LinearPlan& plan = plan_of_packed(packed, n, words, count);
  check_shape(scales, {plan.scale_rows, n}, "scales");
  check_shape(wsum, {static_cast<int64_t>(plan.runs.size()), n}, "wsum");
  const Rows rows = rows_of(x, plan.columns, "x");

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor out = empty(shape, x.scalar_type(), x);

  LinearArgs args{};
  if (bias) {
    check_shape(*bias, {n}, "bias");
    check_contiguous(*bias, "bias");
    args.bias = bias->const_data_ptr();
    args.bias_dtype = float_dtype(*bias, "bias");
  }
  if (rows.count == 0) return out;
  args.plan = plan.view();
  args.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.weight_scale = static_cast<const float*>(scales.const_data_ptr());
  args.weight_sum = static_cast<const int32_t*>(wsum.const_data_ptr());
  args.n = n;
  args.out = out.mutable_data_ptr();
  args.out_dtype = rows.dtype;
  args.out_stride = n;
  run_linear(quantize_args(rows, plan, hadamard_k), args, rows.count);
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
              const std::optional<Tensor>& bias, int64_t n, std::vector<int64_t> segments,
              std::vector<int64_t> group_bits, int64_t hadamard_groups, const std::optional<Tensor>& hadamard_k,
              int64_t weight_group) {
  const std::vector<int64_t> words = plan_words(segments, group_bits, hadamard_groups, weight_group);
  return run(x, packed, scales, wsum, bias, n, words.data(), static_cast<int64_t>(words.size()), hadamard_k);
}

Tensor linear_planned(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                      const std::optional<Tensor>& bias, const Tensor& plan, const std::optional<Tensor>& hadamard_k) {
  check_dtype(plan, ScalarType::Long, "plan", "int64");
  check_contiguous(plan, "plan");
  check(scales.dim() == 2, "scales must have shape [rows, N]");
  return run(x, packed, scales, wsum, bias, scales.size(1), static_cast<const int64_t*>(plan.const_data_ptr()),
             plan.numel(), hadamard_k);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, std::vector<int64_t> segments,
                                                       std::vector<int64_t> group_bits, int64_t hadamard_groups,
                                                       const std::optional<Tensor>& hadamard_k) {
  const std::vector<int64_t> words = plan_words(segments, group_bits, hadamard_groups, 0);
  const LinearPlan& plan = cached_plan(words.data(), static_cast<int64_t>(words.size()), 4);
  check(x.dim() == 2, "x must have shape [M, K], not " + shape_of(x));
  const Rows rows = rows_of(x, plan.columns, "x");
  const int64_t groups = static_cast<int64_t>(plan.group_bits.size());
  Tensor codes = empty({rows.count, plan.columns}, ScalarType::Byte, x);
  Tensor scale = empty({rows.count, groups}, ScalarType::Float, x);
  Tensor zero = empty({rows.count, groups}, ScalarType::Int, x);
  QuantizeArgs q = quantize_args(rows, plan, hadamard_k);
  q.column_order = true;
  q.codes = codes.mutable_data_ptr();
  q.code_stride = plan.columns;
  q.scale = static_cast<float*>(scale.mutable_data_ptr());
  q.zero = static_cast<int32_t*>(zero.mutable_data_ptr());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, rows.count * q.plan.blocks, 1,
                              [&](int64_t begin, int64_t end) { k.quantize(q, begin, end); });
  return {codes, scale, zero};
}

Tensor hadamard(const Tensor& x, int64_t groups, const std::optional<Tensor>& hadamard_k) {
  check(x.dim() > 0 && groups > 0, "hadamard needs at least one column and one group");
  const Rows rows = rows_of(x, x.size(x.dim() - 1), "x");
  Tensor out = torch::stable::new_empty(x, x.sizes());
  HadamardRowsArgs args{};
  args.columns = x.size(x.dim() - 1);
  args.hadamard = hadamard_args(groups, hadamard_k, args.columns);
  args.x = rows.tensor.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.dtype = rows.dtype;
  args.x_stride = rows.stride;
  args.out_stride = args.columns;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) { k.hadamard(args, begin, end); });
  return out;
}

}  // namespace resq
