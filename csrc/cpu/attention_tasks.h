// Cuts a batch of attention into tasks and runs them.
#pragma once

#include <vector>

#include "kernels.h"

namespace resq {

struct AttentionBatch {
  int64_t sequences, kv_heads;
  const int32_t* seq_lens;         // [sequences]
  const int32_t* query_start_loc;  // [sequences + 1]
  // Not null: every sequence has one new token that is not in its page yet. The tasks write it, each for its heads, so no
  // thread waits for the others or for lines in another core's cache.
  const KVWriteArgs* writes;
};

void run_attention(const AttentionArgs& args, const AttentionBatch& batch);

}  // namespace resq
