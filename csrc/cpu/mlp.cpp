#include "mlp.h"

#include <algorithm>

namespace resq {
namespace {

// Rows that are worked on together: at most kMostRows, and so few that gate_up's output stays below the 32 MiB from which
// malloc takes a block from the system and gives it back every time (resq_vllm/memory.py has it keep smaller ones). For
// all 2048 rows of a batch of prompts that is 64 MB in a 1B model, whose page faults were a seventh of the time. A buffer
// of our own, kept between calls, would be 22 MiB that attention and the other layers cannot use.
constexpr int64_t kMostRows = 768, kRowStep = 32, kMostBytes = (int64_t{32} << 20) - (64 << 10);

}  // namespace

int64_t mlp_rows_at_once(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::clamp(kMostBytes / row_bytes / kRowStep * kRowStep, kRowStep, kMostRows);
  const int64_t parts = (rows + most - 1) / most;
  return parts <= 1 ? rows : (rows + parts * kRowStep - 1) / (parts * kRowStep) * kRowStep;
}

void check_mlp(const CheckedLayer& up, const CheckedLayer& down) {
  check(up.linear.n == 2 * down.plan->columns, [&] {
    return "gate_up has " + std::to_string(up.linear.n) + " outputs, not twice down's " +
           std::to_string(down.plan->columns) + " columns";
  });
}

void run_mlp(const CheckedLayer& up, const CheckedLayer& down, const RowsAt& x, const BeforeArgs& norm, void* inner,
             void* out) {
  const int64_t width = up.linear.n, step = mlp_rows_at_once(x.count, width * bytes_of(x.dtype));
  for (int64_t first = 0; first < x.count; first += step) {
    const int64_t count = std::min(step, x.count - first);
    BeforeArgs before = norm, silu{};
    before.residual = row_address(norm.residual, x.dtype, first * norm.residual_stride);
    before.residual_out = row_address(norm.residual_out, x.dtype, first * norm.residual_out_stride);
    run_checked(up, {row_address(x.data, x.dtype, first * x.stride), x.dtype, count, x.stride}, before, inner);
    silu.kind = Before::silu_mul;
    run_checked(down, {inner, x.dtype, count, width}, silu, row_address(out, x.dtype, first * down.linear.n));
  }
}

}  // namespace resq
