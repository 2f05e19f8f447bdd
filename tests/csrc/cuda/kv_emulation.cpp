// csrc/cuda/kv_decode.h on the host, behind C functions for ctypes.
#define RESQ_DEVICE_EMULATOR "emulator.h"
#include "kv_decode.h"

#include "kv_launch.h"

using namespace resq::cuda;

namespace {

void expose(const void* p, int64_t bytes) {
  if (p) emulator::buffers.push_back({static_cast<const uint8_t*>(p), static_cast<size_t>(bytes), false});
}

template <class P, int kRows8>
void run(const KvDecodeArgs& args, int64_t sequences, int64_t seed) {
  emulator::launch(static_cast<int>(sequences * args.kv_heads * args.splits), 1, 32, kKvDecodeShared<P>,
                   static_cast<uint32_t>(seed), [&] { kv_decode<P, kRows8>(args); });
}

}  // namespace

extern "C" {

int resq_kv_args_bytes() { return static_cast<int>(sizeof(KvDecodeArgs)); }

// bytes: of query, cache, output, partial, log_sums, block_table, seq_lens, query_start: what may be touched.
int resq_kv_decode(const KvDecodeArgs* args, int64_t head_dim, int64_t sequences, const int64_t* bytes, int64_t seed) {
  emulator::buffers.clear();
  const void* const tensors[] = {args->query,    args->cache,       args->output,   args->partial,
                                 args->log_sums, args->block_table, args->seq_lens, args->query_start};
  for (int i = 0; i < 8; ++i) expose(tensors[i], bytes[i]);
#define RESQ_RUN(DIM, HIGH)                                                                               \
  if (head_dim == DIM) {                                                                                  \
    args->rows <= 8 ? run<KvPage<DIM, HIGH>, 1>(*args, sequences, seed) : run<KvPage<DIM, HIGH>, 2>(*args, sequences, seed); \
    return 0;                                                                                             \
  }
  RESQ_KV_PAGES(RESQ_RUN)
  return 1;
}

int resq_kv_page(int64_t head_dim, int64_t* offsets) {
#define RESQ_PAGE(DIM, HIGH)                                                                                        \
  if (head_dim == DIM) {                                                                                            \
    using P = KvPage<DIM, HIGH>;                                                                                    \
    const int64_t found[] = {P::kKeyLow, P::kKeyHigh, P::kValueLow, P::kValueHigh, P::kScales, P::kZeros, P::kBytes}; \
    std::copy(std::begin(found), std::end(found), offsets);                                                         \
    return 0;                                                                                                       \
  }
  RESQ_KV_PAGES(RESQ_PAGE)
  return 1;
}

}  // extern "C"
