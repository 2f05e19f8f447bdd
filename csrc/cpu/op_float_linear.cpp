// torch.ops.resq.linear_bf16: checks, then the rows of W in shares.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "isa.h"
#include "layer.h"
#include "share.h"

namespace resq {
namespace {

constexpr int64_t kVector = 16;              // floats of the widest ISA
constexpr int64_t kStepBytes = 256 << 10;    // of weights that a thread takes at a time: four streams of 64 KiB
constexpr int64_t kHelpBytes = 64 << 10;     // and of another thread's
constexpr int64_t kMostRows = 8;             // their float32 columns stay in the L2 cache beside the streams

}  // namespace

Tensor linear_bf16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(weight.dim() == 2 && weight.size(1) > 0, "weight must have shape [N, K]");
  check_dtype(weight, ScalarType::BFloat16, "weight", "bfloat16");
  check_dtype(x, ScalarType::BFloat16, "x", "bfloat16");
  check_contiguous(weight, "weight");
  FloatRowsArgs args{};
  args.n = weight.size(0);
  args.columns = weight.size(1);
  if (bias) {
    check_dtype(*bias, ScalarType::BFloat16, "bias", "bfloat16");
    check_shape(*bias, {args.n}, "bias");
    check_contiguous(*bias, "bias");
    args.bias = static_cast<const uint16_t*>(bias->const_data_ptr());
  }
  const Rows rows = rows_of(x, args.columns, "x");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = args.n;
  Tensor out = torch::stable::new_empty(x, shape);
  args.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  args.row_stride = rows.stride;
  args.padded = (args.columns + 2 * kVector - 1) / (2 * kVector) * kVector;
  const Kernels& k = kernels();
  const auto share = [&](int64_t bytes) { return std::max<int64_t>(1, bytes / (2 * args.columns)); };
  for (int64_t first = 0; first < rows.count; first += kMostRows) {
    FloatRowsArgs part = args;
    part.rows = std::min(kMostRows, rows.count - first);
    part.x = static_cast<const uint16_t*>(rows.tensor.const_data_ptr()) + first * rows.stride;
    part.out = static_cast<uint16_t*>(out.mutable_data_ptr()) + first * args.n;
    share_streams(args.n, share(kHelpBytes), share(kStepBytes), [&](bool) { return k.float_rows_input(part); },
                  [&](const float* spread, int64_t begin, int64_t end) { k.float_rows(part, spread, begin, end); });
  }
  return out;
}

}  // namespace resq
