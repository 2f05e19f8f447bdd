// Cuts a batch of attention into tasks and runs them.
#pragma once

#include <vector>

#include "kernels.h"

namespace resq {

struct AttentionBatch {
  int64_t sequences, kv_heads;
  const int32_t* seq_lens;         // [sequences]
  const int32_t* query_start_loc;  // [sequences + 1]
};

void run_attention(const AttentionArgs& args, const AttentionBatch& batch);

}  // namespace resq
