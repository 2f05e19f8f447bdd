// A linear layer's tensors, checked and turned into the kernels' arguments: what the ops that end in a layer share.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"
#include "plan.h"
#include "tensors.h"

namespace resq {

// x [..., K] as rows with unit stride between columns.
struct Rows {
  Tensor tensor;
  int64_t count, stride;
  DType dtype;
};
Rows rows_of(const Tensor& x, int64_t columns, const char* name);

HadamardArgs hadamard_args(int64_t groups, const std::optional<Tensor>& dense, int64_t columns);

QuantizeArgs quantize_args(const Rows& rows, const LinearPlan& plan, const std::optional<Tensor>& hadamard_k);

// A packed layer with n outputs; words, count: its plan (plan.h).
struct Layer {
  const Tensor &packed, &scales, &wsum;
  const std::optional<Tensor>& bias;
  int64_t n;
  const int64_t* words;
  int64_t count;
  const std::optional<Tensor>& hadamard_k;
};

// The same with its plan in a tensor, which must outlive it.
Layer planned_layer(const Tensor& packed, const Tensor& scales, const Tensor& wsum, const std::optional<Tensor>& bias,
                    const Tensor& plan, const std::optional<Tensor>& hadamard_k);

// A layer whose tensors were checked, as kernels take it: all but its input and output. Valid while the tensors live.
struct CheckedLayer {
  std::shared_ptr<const LinearPlan> plan;
  LinearArgs linear;
  HadamardArgs hadamard;
};
CheckedLayer check_layer(const Layer& layer);

// y [rows, n] of rows of x, one after the other at `out`.
struct RowsAt {
  const void* data;
  DType dtype;
  int64_t count, stride;
};
void run_checked(const CheckedLayer& layer, const RowsAt& x, const BeforeArgs& before, void* out);

// What happens to x first. For RMSNorm: weight [K] and, where there is one, the residual stream, shaped like x, whose
// sum with x goes to residual_out.
struct BeforeLayer {
  Before kind = Before::nothing;
  const Tensor* weight = nullptr;
  double epsilon = 0.0;
  const Tensor* residual = nullptr;
  Tensor* residual_out = nullptr;
};

// The same as kernels take it, for `rows` rows of `columns` like x.
BeforeArgs before_args(const BeforeLayer& before, int64_t rows, int64_t columns, const Tensor& x);

// y [..., n] of x [..., K] ([..., 2K] before SiLU·mul).
Tensor run_layer(const Tensor& x, const Layer& layer, const BeforeLayer& before = {});

}  // namespace resq
