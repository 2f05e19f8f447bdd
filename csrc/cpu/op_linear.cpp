// torch.ops.resq.linear, linear_planned, quantize_activation and hadamard: checks, then the kernels.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "isa.h"
#include "layer.h"

namespace resq {
namespace {

Tensor empty(std::vector<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
              const std::optional<Tensor>& bias, int64_t n, std::vector<int64_t> segments,
              std::vector<int64_t> group_bits, int64_t hadamard_groups, const std::optional<Tensor>& hadamard_k,
              int64_t weight_group) {
  const std::vector<int64_t> words = plan_words(segments, group_bits, hadamard_groups, weight_group);
  return run_layer(x, {packed, scales, wsum, bias, n, words.data(), static_cast<int64_t>(words.size()), hadamard_k});
}

Tensor linear_planned(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
                      const std::optional<Tensor>& bias, const Tensor& plan, const std::optional<Tensor>& hadamard_k) {
  return run_layer(x, planned_layer(packed, scales, wsum, bias, plan, hadamard_k));
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, std::vector<int64_t> segments,
                                                       std::vector<int64_t> group_bits, int64_t hadamard_groups,
                                                       const std::optional<Tensor>& hadamard_k) {
  const std::vector<int64_t> words = plan_words(segments, group_bits, hadamard_groups, 0);
  const auto kept = cached_plan(words.data(), static_cast<int64_t>(words.size()), 4);
  const LinearPlan& plan = *kept;
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
