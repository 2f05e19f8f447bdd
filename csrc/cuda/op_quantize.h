// The quantize ops that other ops call.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "torch_checks.h"

namespace resq::cuda {

std::tuple<Tensor, Tensor, Tensor> quantize_pack(const Tensor& x, std::vector<int64_t> segments,
                                                 std::vector<int64_t> group_bits, int64_t hadamard_groups,
                                                 const std::optional<Tensor>& hadamard_k, int64_t weight_group,
                                                 bool nibbles);

}  // namespace resq::cuda
