// torch.ops.resq.rope.
#include "rope.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../ops.h"
#include "isa.h"

namespace resq {
namespace {

constexpr int64_t kRopeValues = 1 << 15;  // that a thread should have; a decode step's tokens stay on one

}  // namespace

CosSin cos_sin(const Tensor& t) {
  check(t.dim() == 2 && t.is_contiguous() && t.size(1) % 2 == 0 && 0 < t.size(1) && t.size(1) <= kMaxHeadDim,
        "cos_sin_cache must have shape [positions, head_dim] and be contiguous, with an even head_dim of at most 512");
  return {t.const_data_ptr(), float_dtype(t, "cos_sin_cache"), t.size(0), t.size(1)};
}

const int64_t* check_positions(const Tensor& positions, int64_t tokens, const CosSin& table) {
  check_dtype(positions, ScalarType::Long, "positions", "int64");
  check_shape(positions, {tokens}, "positions");
  check_contiguous(positions, "positions");
  const int64_t* at = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    check(0 <= at[t] && at[t] < table.positions, [&] {
      return "positions names " + std::to_string(at[t]) + ", but cos_sin_cache ends before " +
             std::to_string(table.positions);
    });
  return at;
}

void turn(void* x, int64_t tokens, int64_t stride, int64_t heads, const int64_t* positions, const CosSin& table) {
  const RopeArgs args{x, table.dtype, stride, heads, table.head_dim, table.data, positions};
  const int64_t grain = std::max<int64_t>(1, kRopeValues / std::max<int64_t>(1, heads * table.head_dim));
  if (tokens <= grain) return kernels().rope(args, 0, tokens);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { kernels().rope(args, begin, end); });
}

void rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin_cache, int64_t heads) {
  check(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must have shape [tokens, columns] with contiguous rows");
  const CosSin table = cos_sin(cos_sin_cache);
  check(cos_sin_cache.scalar_type() == x.scalar_type(), "cos_sin_cache must have x's dtype");
  check(0 < heads && heads * table.head_dim <= x.size(1), [&] {
    return "x has " + std::to_string(x.size(1)) + " columns, too few for " + std::to_string(heads) + " heads of " +
           std::to_string(table.head_dim);
  });
  turn(x.mutable_data_ptr(), x.size(0), x.stride(0), heads, check_positions(positions, x.size(0), table), table);
}

}  // namespace resq
