// The launcher of the decode attention kernels, and the pages they are made for.
#pragma once

#include "kv_page.h"

// head_dim, dims at 8 bits: an eighth, as ResQ keeps them.
#define RESQ_KV_PAGES(X) X(64, 8) X(96, 12) X(128, 16)

using cudaStream_t = struct CUstream_st*;

namespace resq::cuda {

struct KvDecodeArgs;

// Query rows of a sequence and kv head that the kernels take at most.
constexpr int kKvDecodeRows = 16;

// Bytes of such a page, 0 where no kernel is made for it.
constexpr int64_t kv_page_bytes(int64_t head_dim, int64_t high) {
#define RESQ_BYTES(DIM, HIGH) \
  if (head_dim == DIM && high == HIGH) return KvPage<DIM, HIGH>::kBytes;
  RESQ_KV_PAGES(RESQ_BYTES)
#undef RESQ_BYTES
  return 0;
}

// Queues one kernel on the stream; null, or the CUDA runtime's words for what went wrong.
const char* launch_kv_decode(const KvDecodeArgs& args, int64_t head_dim, int64_t sequences, cudaStream_t stream);

}  // namespace resq::cuda
