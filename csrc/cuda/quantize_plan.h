// From a plan to the quantize kernels' arguments: everything but the pointers. Host code without torch headers.
#pragma once

#include "plan.h"
#include "quantize_args.h"

namespace resq::cuda {

// Where the codes go: packed by part (formats.h), or a byte each in x's column order.
enum class Order { parts, columns };

// The arguments for rows of `plan`, whose online Hadamard has `hadamard_groups` blocks (0 = none) and a dense factor of
// order `hadamard_k`. Throws std::runtime_error with one sentence when the kernels' tables cannot hold the plan.
QuantizeArgs make_quantize_args(const ActivationPlan& plan, int64_t hadamard_groups, int64_t hadamard_k, Order order);

// The arguments of the transform alone, of `columns` columns.
QuantizeArgs make_hadamard_args(int64_t columns, int64_t hadamard_groups, int64_t hadamard_k);

}  // namespace resq::cuda
