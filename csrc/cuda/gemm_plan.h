// From the runs of the quantized activations to those of the packed weights. Host code without torch headers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats.h"
#include "weights.h"

namespace resq::cuda {

struct GemmPlan {
  std::vector<GemmRun> runs;
  std::vector<int64_t> start;  // of every run: its first column in the part's checkpoint tensor
  int32_t blocks = 0;          // of a tile of channels
};

// Throws std::runtime_error with one sentence when a run is too long for exact int32 sums.
inline GemmPlan make_gemm_plan(const std::vector<RunSpan>& spans, int low_bits) {
  GemmPlan plan;
  int64_t used[2] = {0, 0};
  for (const RunSpan& span : spans) {
    if (span.length > kMaxRunColumns)
      throw std::runtime_error("a run of " + std::to_string(span.length) + " columns does not fit int32 sums; at most " +
                               std::to_string(kMaxRunColumns) + " columns may share an activation scale");
    const bool nibbles = span.part == 0 && low_bits == 4;
    const int32_t blocks = run_blocks(span.length, nibbles);
    plan.runs.push_back(
        {span.part, span.at, span.length, span.group, span.scale_row, plan.blocks, blocks, nibbles ? 1 : 0});
    plan.start.push_back(used[span.part]);
    used[span.part] += span.length;
    plan.blocks += blocks;
  }
  return plan;
}

}  // namespace resq::cuda
