#include "pack.h"

#include <algorithm>
#include <vector>

namespace resq {
namespace {

// Column `k` of a part's weights for output `n`, as a signed code.
int32_t weight_code(const PackArgs& args, const RunPlace& run, int64_t part_columns, int64_t n, int64_t k) {
  if (run.part == 1) return args.high[n * part_columns + k];
  if (args.low_bits == 8) return reinterpret_cast<const int8_t*>(args.low)[n * part_columns + k];
  const uint8_t byte = args.low[n * (part_columns / 2) + k / 2];
  const int32_t nibble = k % 2 ? byte >> 4 : byte & 15;
  return nibble > 7 ? nibble - 16 : nibble;
}

void pack_run(const PackArgs& args, const RunPlace& run, int64_t part_columns, int64_t first, uint8_t* to,
              int32_t* sums) {
  const int64_t outputs = std::min(kSuperblock, args.n - first);
  std::vector<int32_t> codes(run.padded, 0);
  for (int64_t n = 0; n < kSuperblock; ++n) {
    if (n < outputs) {
      int32_t sum = 0;
      for (int64_t k = 0; k < run.length; ++k) {
        codes[k] = weight_code(args, run, part_columns, first + n, run.start + k);
        sum += codes[k];
      }
      sums[first + n] = sum;
    } else {
      std::fill(codes.begin(), codes.end(), 0);
    }
    for (int64_t g = 0; g < run.padded / (run.nibbles ? 8 : 4); ++g) {
      uint8_t* word = to + g * 256 + n * 4;
      for (int64_t j = 0; j < 4; ++j) {
        if (run.nibbles) {
          word[j] = static_cast<uint8_t>((codes[8 * g + j] + 8) | (codes[8 * g + 4 + j] + 8) << 4);
        } else {
          word[j] = static_cast<uint8_t>(codes[4 * g + j] + 128);
        }
      }
    }
  }
}

}  // namespace

void pack_superblocks(const PackArgs& args, const LinearPlan& plan, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    for (size_t r = 0; r < plan.runs.size(); ++r) {
      const RunPlace& run = plan.runs[r];
      pack_run(args, run, plan.part_columns[run.part], block * kSuperblock,
               args.packed + block * plan.superblock_bytes + run.weight_at, args.sums + r * args.n);
    }
}

}  // namespace resq
