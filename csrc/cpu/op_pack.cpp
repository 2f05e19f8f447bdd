// torch.ops.resq.pack_weight: checks, then pack.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../ops.h"
#include "huge_pages.h"
#include "pack.h"
#include "tensors.h"

namespace resq {
namespace {

// uint8 [bytes] that begins on a 2 MiB page where it fills one. A decode step reads every weight once, one token's worth
// of work a byte, and takes a third longer on pages of 4 KiB (M = 1, 4096 x 4096, two threads: 0.65 against 0.49 ms).
Tensor empty_weight(int64_t bytes, const Tensor& like) {
  if (bytes < kHugePage) return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  Tensor whole = torch::stable::new_empty(like, {bytes + kHugePage}, ScalarType::Byte);
  forget_pages(whole.mutable_data_ptr(), bytes + kHugePage);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(whole.mutable_data_ptr()) % kHugePage);
  Tensor weight = torch::stable::narrow(whole, 0, past ? kHugePage - past : 0, bytes);
  prefer_huge_pages(weight.mutable_data_ptr(), bytes);
  return weight;
}

}  // namespace

std::tuple<Tensor, Tensor> pack_weight(const std::optional<Tensor>& low, const std::optional<Tensor>& high,
                                       int64_t low_bits, int64_t n, std::vector<int64_t> segments,
                                       int64_t weight_group) {
  check(low || high, "pack_weight needs at least one of low and high");
  check(low_bits == 4 || low_bits == 8, "low_bits must be 4 or 8, not " + std::to_string(low_bits));
  check(n > 0, "n must be positive");
  // Only the number of activation groups matters here, since a run is one group's; their bits do not.
  int64_t groups = 0;
  for (size_t i = 2; i < segments.size(); i += 3) groups = std::max(groups, segments[i] + 1);
  const std::vector<int64_t> group_bits(static_cast<size_t>(groups), 8);
  const LinearPlan plan = make_plan(segments, group_bits, static_cast<int>(low_bits), 0, weight_group);

  PackArgs args{};
  const int64_t columns[2] = {plan.part_columns[0], plan.part_columns[1]};
  check((columns[0] > 0) == low.has_value(), "low must be given exactly when the segments have low columns");
  check((columns[1] > 0) == high.has_value(), "high must be given exactly when the segments have high columns");
  if (low) {
    check(low_bits == 8 || columns[0] % 2 == 0, "4-bit weights need an even number of low columns");
    check_dtype(*low, low_bits == 4 ? ScalarType::Byte : ScalarType::Char, "low",
                low_bits == 4 ? "uint8 (two 4-bit weights a byte)" : "int8");
    check_shape(*low, {n, low_bits == 4 ? columns[0] / 2 : columns[0]}, "low");
    check_contiguous(*low, "low");
    args.low = static_cast<const uint8_t*>(low->const_data_ptr());
  }
  if (high) {
    check_dtype(*high, ScalarType::Char, "high", "int8");
    check_shape(*high, {n, columns[1]}, "high");
    check_contiguous(*high, "high");
    args.high = static_cast<const int8_t*>(high->const_data_ptr());
  }

  const int64_t superblocks = (n + kSuperblock - 1) / kSuperblock;
  const Tensor& like = low ? *low : *high;
  const std::vector<int64_t> sums_shape{static_cast<int64_t>(plan.runs.size()), n};
  Tensor packed = empty_weight(superblocks * plan.superblock_bytes, like);
  Tensor sums = torch::stable::new_empty(like, sums_shape, ScalarType::Int);
  args.low_bits = static_cast<int>(low_bits);
  args.n = n;
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.sums = static_cast<int32_t*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, superblocks, 1,
                              [&](int64_t begin, int64_t end) { pack_superblocks(args, plan, begin, end); });
  collapse_pages(packed.mutable_data_ptr(), packed.numel());
  return {packed, sums};
}

}  // namespace resq
