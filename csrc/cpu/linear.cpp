#include "linear.h"

#include <unistd.h>

#include <algorithm>

#include "isa.h"
#include "share.h"

namespace resq {
namespace {

// Rows multiplied together: their codes stay in the L2 cache, but every panel reads and unpacks the weights again. Of
// 128, 192 and 256 rows of 4096 columns the last are fastest. Of 256, 384 and 512 rows of 2048 the second with 2 MiB of
// L2 (Intel), the first with 1 MiB (Zen 4: × 1.02 at 1024 rows of 8192 x 2048).
constexpr int64_t kPanelBytes = 1 << 20;
int64_t most_panel_rows() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t rows = sysconf(_SC_LEVEL2_CACHE_SIZE) >= (2 << 20) ? 384 : 256;
  return rows;
#else
  return 256;
#endif
}
// Codes of all panels are made before the first is multiplied, so that threads wait for each other twice, not twice a
// panel: up to so many bytes.
constexpr int64_t kCodeBytes = 16 << 20;
// Rows·columns up to which every thread quantizes all of them for itself, 5 µs of work, instead of forking twice: a fork
// and join costs 1 to 2 µs on idle cores, and milliseconds where they are shared.
constexpr int64_t kInlineColumns = 16384;
constexpr int64_t kSiluColumns = 4;  // how many of them a column with SiLU·mul before it is worth
// Bytes of weights that are worth a thread, 5 µs of reading, and that it takes at a time.
constexpr int64_t kThreadBytes = 64 << 10;
// An output of this size goes around the caches, half of which it would fill.
constexpr int64_t kStreamBytes = 1 << 20;
// Wider ones where a task reads its codes anew, more than stay in a cache: × 1.03 at 256 rows of 8192 columns.
constexpr int64_t kTasksPerThread = 8, kWideTasksPerThread = 4;
constexpr int64_t kReadingRows = 3;   // rows that take as long as reading the weights
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

int64_t share_of(int64_t count, int64_t tasks) { return std::max<int64_t>(1, count / tasks); }

// Rows [first, first + rows) as arguments of their own.
void move_rows(QuantizeArgs& q, LinearArgs& l, int64_t first) {
  BeforeArgs& before = q.before;
  q.x = row_address(q.x, q.dtype, first * q.row_stride);
  if (before.residual) before.residual = row_address(before.residual, q.dtype, first * before.residual_stride);
  if (before.residual_out)
    before.residual_out = row_address(before.residual_out, q.dtype, first * before.residual_out_stride);
  l.out = row_address(l.out, l.out_dtype, first * l.out_stride);
}

// The rows whose codes fit together.
void run_rows(const QuantizeArgs& q, const LinearArgs& l, int64_t rows, int64_t panel_rows) {
  const Kernels& k = kernels();
  const int64_t threads = usable_threads();
  const bool wide = std::min(rows, panel_rows) * q.plan.columns > kPanelBytes;
  const int64_t tasks = threads == 1 ? 1 : (wide ? kWideTasksPerThread : kTasksPerThread) * threads;
  const int64_t units = rows * q.plan.blocks;
  share_out(units, share_of(units, tasks), [&](int64_t begin, int64_t end) { k.quantize(q, begin, end); });

  const int64_t superblocks = (l.n + kSuperblock - 1) / kSuperblock;
  if (rows <= kReadingRows) {  // read in order, as many side by side as is fastest
    const int64_t share = std::max<int64_t>(1, kThreadBytes / l.plan.superblock_bytes);
    const auto nothing = [](bool) { return 0; };
    share_streams(superblocks, share, std::max(share, k.abreast(rows)), nothing,
                  [&](int, int64_t begin, int64_t end) { k.linear(l, begin, end, 0, rows); });
    return;
  }
  const int64_t panels = (rows + panel_rows - 1) / panel_rows;
  // Few superblocks leave threads idle: cut the rows as well.
  const int64_t tile = rows >= 2 * kPanelTile ? kPanelTile : kRowTile;
  const int64_t wanted = threads == 1 || superblocks * panels >= tasks / 2 ? panels : tasks / 2 / superblocks + 1;
  const int64_t height = std::max(tile, ((rows + wanted - 1) / wanted + tile - 1) / tile * tile);
  const int64_t parts = (rows + height - 1) / height;
  // Neighbouring superblocks of the same rows in one call: the kernel reads ahead from one to the next.
  const int64_t width = share_of(superblocks, (tasks + parts - 1) / parts);
  const int64_t widths = (superblocks + width - 1) / width;
  share_streams(parts * widths, 1, 1, [](bool) { return 0; }, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / widths * height, superblock = task % widths * width;
      k.linear(l, superblock, std::min(superblocks, superblock + width), from, std::min(rows, from + height));
    }
  });
}

}  // namespace

void run_linear(QuantizeArgs quantize, LinearArgs args, int64_t rows) {
  const Kernels& k = kernels();
  args.out_past_caches = rows * args.n * 2 >= kStreamBytes;
  const int64_t work = quantize.before.kind == Before::silu_mul ? kSiluColumns : 1;
  if (rows * args.plan.columns * work <= kInlineColumns) {
    // So little to quantize that doing it once per thread beats a second fork and join.
    const int64_t superblocks = (args.n + kSuperblock - 1) / kSuperblock;
    const int64_t share = std::max<int64_t>(1, kThreadBytes / args.plan.superblock_bytes);
    const auto quantized = [&](bool first) {
      QuantizeArgs q = quantize;
      LinearArgs l = args;
      if (!first) q.before.residual_out = nullptr;
      place_activation(q, l, rows, Slot::inline_codes);
      k.quantize(q, 0, rows * q.plan.blocks);
      return l;
    };
    share_streams(superblocks, share, std::max(share, k.abreast(rows)), quantized,
                  [&](const LinearArgs& l, int64_t begin, int64_t end) { k.linear(l, begin, end, 0, rows); });
    return;
  }
  const int64_t fit = kPanelBytes / args.plan.padded_columns / kPanelTile * kPanelTile;
  const int64_t panel = std::max(k.panel_rows, std::min(fit, most_panel_rows()));
  const int64_t most = std::max<int64_t>(1, kCodeBytes / code_stride(args.plan) / panel) * panel;
  place_activation(quantize, args, std::min(rows, most), Slot::panel_codes);
  for (int64_t first = 0; first < rows; first += most) {
    QuantizeArgs q = quantize;
    LinearArgs l = args;
    move_rows(q, l, first);
    run_rows(q, l, std::min(most, rows - first), panel);
  }
}

}  // namespace resq
