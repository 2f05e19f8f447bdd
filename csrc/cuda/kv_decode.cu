#include "kv_decode.h"

#include "kv_launch.h"
#include "launch_common.cuh"

namespace resq::cuda {
namespace {

template <class P, int kRows8>
__global__ __launch_bounds__(32, kRows8 == 1 ? 11 : 1) void kv_decode_kernel(const __grid_constant__ KvDecodeArgs args) {
  kv_decode<P, kRows8>(args);
}

template <class P, int kRows8>
const char* run(const KvDecodeArgs& args, int64_t sequences, cudaStream_t stream) {
  // Shared memory is what bounds the programs of a processor; left alone, the driver may leave half of it to the L1 cache.
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kv_decode_kernel<P, kRows8>),
                           cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return outcome(error);
  const dim3 grid(static_cast<unsigned>(sequences * args.kv_heads * args.splits));
  return launch_kernel(kv_decode_kernel<P, kRows8>, grid, 32, kKvDecodeShared<P>, false, stream, args);
}

}  // namespace

const char* launch_kv_decode(const KvDecodeArgs& args, int64_t head_dim, int64_t sequences, cudaStream_t stream) {
  switch (head_dim) {
#define RESQ_CASE(DIM, HIGH)                                                         \
  case DIM:                                                                          \
    return args.rows <= 8 ? run<KvPage<DIM, HIGH>, 1>(args, sequences, stream)       \
                          : run<KvPage<DIM, HIGH>, 2>(args, sequences, stream);
    RESQ_KV_PAGES(RESQ_CASE)
    default: return "no such kernel";
  }
}

}  // namespace resq::cuda
