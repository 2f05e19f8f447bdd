// Checkpoint weights -> superblocks of 64 output columns, and the column sums of every run.
#pragma once

#include "plan.h"

namespace resq {

struct PackArgs {
  const uint8_t* low;  // 4 bit: nibbles [n, K_l/2]; 8 bit: int8 [n, K_l]; null when the part has no columns
  const int8_t* high;  // [n, K_h]
  int low_bits;
  int64_t n;
  uint8_t* packed;  // [superblocks, superblock_bytes]
  int32_t* sums;    // [runs, n]
};

// Superblocks [begin, end). Outputs past n and columns past a run's length get the code of weight 0.
void pack_superblocks(const PackArgs& args, const LinearPlan& plan, int64_t begin, int64_t end);

}  // namespace resq
