#include "linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "isa.h"

namespace resq {
namespace {

// Rows quantized and multiplied together: their codes stay in the L2 cache (a panel of 2 MiB at K = 8192 is 8 % slower
// than one of 1 MiB), but every panel reads and unpacks the weights again (64 rows are 25 % slower than 128).
constexpr int64_t kPanelBytes = 1 << 20, kLeastPanelRows = 128, kMostPanelRows = 256;
// Rows·columns up to which every thread quantizes all of them for itself, 5 µs of work, instead of forking twice: a fork
// and join costs 1 to 2 µs on idle cores, and milliseconds where they are shared.
constexpr int64_t kInlineColumns = 16384;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kRowTile = 6;       // rows of a micro-kernel
constexpr int64_t kPanelTile = 32;    // rows of a pair of tiles
constexpr int64_t kRowPadding = 15;   // rows that tiles read past the last one, whatever they hold

// An odd number of cache lines from row to row: the 16 rows of a tile at a stride of 4 KiB would share one cache set.
int64_t code_stride(const PlanView& plan) { return plan.padded_columns | 64; }

// Codes and their scalars for `rows` rows, in one scratch buffer.
int64_t activation_bytes(const PlanView& plan, int64_t rows) {
  return (rows + kRowPadding) * code_stride(plan) + rows * (plan.n_groups * 8 + plan.n_runs * 4) + 3 * 64;
}

void place_activation(QuantizeArgs& quantize, LinearArgs& args, int64_t rows, Slot slot) {
  const PlanView& plan = args.plan;
  uint8_t* at = static_cast<uint8_t*>(thread_scratch(slot, activation_bytes(plan, rows)));
  const auto take = [&](int64_t bytes) {
    uint8_t* taken = at;
    at += (bytes + 63) / 64 * 64;
    return taken;
  };
  quantize.scale = reinterpret_cast<float*>(take(rows * plan.n_groups * 4));
  quantize.zero = reinterpret_cast<int32_t*>(take(rows * plan.n_groups * 4));
  quantize.sums = reinterpret_cast<int32_t*>(take(rows * plan.n_runs * 4));
  quantize.codes = at;
  quantize.code_stride = code_stride(plan);
  args.scale = quantize.scale;
  args.zero = quantize.zero;
  args.sums = quantize.sums;
  args.codes = static_cast<const int8_t*>(quantize.codes);
  args.code_stride = quantize.code_stride;
}

const void* row_address(const void* base, DType dtype, int64_t elements) {
  return static_cast<const uint8_t*>(base) + elements * (dtype == DType::f32 ? 4 : 2);
}

}  // namespace

void run_linear(QuantizeArgs quantize, LinearArgs args, int64_t rows) {
  using torch::stable::parallel_for;
  const Kernels& k = kernels();
  const int64_t superblocks = (args.n + kSuperblock - 1) / kSuperblock;

  if (rows * args.plan.columns <= kInlineColumns) {
    // So little to quantize that doing it once per thread beats a second fork and join.
    parallel_for(0, superblocks, 1, [&](int64_t begin, int64_t end) {
      QuantizeArgs q = quantize;
      LinearArgs l = args;
      place_activation(q, l, rows, Slot::inline_codes);
      k.quantize(q, 0, rows * q.plan.blocks);
      for (int64_t s = begin; s < end; ++s) k.linear(l, s, 0, rows);
    });
    return;
  }

  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t panel_rows = std::clamp(kPanelBytes / args.plan.padded_columns / kPanelTile * kPanelTile,
                                        kLeastPanelRows, kMostPanelRows);
  place_activation(quantize, args, std::min(rows, panel_rows), Slot::panel_codes);
  for (int64_t first = 0; first < rows; first += panel_rows) {
    const int64_t panel = std::min(panel_rows, rows - first);
    QuantizeArgs q = quantize;
    LinearArgs l = args;
    q.x = row_address(quantize.x, quantize.dtype, first * quantize.row_stride);
    l.out = const_cast<void*>(row_address(args.out, args.out_dtype, first * args.out_stride));
    parallel_for(0, panel * q.plan.blocks, 1, [&](int64_t begin, int64_t end) { k.quantize(q, begin, end); });
    // Few superblocks leave threads idle: cut the rows as well.
    const int64_t tile = panel >= 2 * kPanelTile ? kPanelTile : kRowTile, tiles = (panel + tile - 1) / tile;
    const int64_t tasks = kTasksPerThread * threads;
    const int64_t wanted = threads == 1 || superblocks >= tasks ? 1 : (tasks + superblocks - 1) / superblocks;
    const int64_t cuts = std::min(wanted, tiles);
    const int64_t share = (tiles + cuts - 1) / cuts * tile;
    const int64_t parts = (panel + share - 1) / share;
    parallel_for(0, superblocks * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t from = task % parts * share;
        k.linear(l, task / parts, from, std::min(panel, from + share));
      }
    });
  }
}

}  // namespace resq
