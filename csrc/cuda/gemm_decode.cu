#include "gemm_kernels.h"
#include "gemm_launch_common.cuh"

namespace resq::cuda {
namespace {

template <class S>
__global__ __launch_bounds__(S::kThreads, S::kCtas) void decode_kernel(const __grid_constant__ GemmArgs args) {
  decode_gemm<S>(args);
}

template <class S>
const char* run(bool overlap, const GemmArgs& args, cudaStream_t stream) {
  const dim3 grid((args.n + S::kChannels - 1) / S::kChannels, args.splits);
  return launch_kernel(decode_kernel<S>, grid, S::kThreads, S::kSharedBytes, overlap, stream, args);
}

#define RESQ_CHECK(NAME, ...) static_assert(matches<__VA_ARGS__>(kKernels[NAME], __VA_ARGS__::kQuads, true, true));
RESQ_DECODE_KERNELS(RESQ_CHECK)

}  // namespace

const char* launch_decode(int32_t kernel, bool overlap, const GemmArgs& args, cudaStream_t stream) {
  switch (kernel) {
#define RESQ_CASE(NAME, ...) \
  case NAME: return run<__VA_ARGS__>(overlap, args, stream);
    RESQ_DECODE_KERNELS(RESQ_CASE)
    default: return "no such decode kernel";
  }
}

}  // namespace resq::cuda
