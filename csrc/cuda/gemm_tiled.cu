#include "gemm_kernels.h"
#include "gemm_launch_common.cuh"

namespace resq::cuda {
namespace {

template <class S>
__global__ __launch_bounds__(S::kThreads, S::kCtas) void tiled_kernel(const __grid_constant__ GemmArgs args) {
  tiled_gemm<S>(args);
}

template <class S>
const char* run(bool overlap, const GemmArgs& args, cudaStream_t stream) {
  const dim3 grid((args.n + S::kChannels - 1) / S::kChannels * ((args.m + S::kTokens - 1) / S::kTokens), args.splits);
  return launch_kernel(tiled_kernel<S>, grid, S::kThreads, S::kSharedBytes, overlap, stream, args);
}

#define RESQ_CHECK(NAME, ...)                                                                             \
  static_assert(matches<__VA_ARGS__>(kKernels[NAME],                                                      \
                                     __VA_ARGS__::kTiles * __VA_ARGS__::kTokens8 * __VA_ARGS__::kThreads, \
                                     !__VA_ARGS__::kSplit, __VA_ARGS__::kSplit));
RESQ_TILED_KERNELS(RESQ_CHECK)

}  // namespace

const char* launch_tiled(int32_t kernel, bool overlap, const GemmArgs& args, cudaStream_t stream) {
  switch (kernel) {
#define RESQ_CASE(NAME, ...) \
  case NAME: return run<__VA_ARGS__>(overlap, args, stream);
    RESQ_TILED_KERNELS(RESQ_CASE)
    default: return "no such tiled kernel";
  }
}

}  // namespace resq::cuda
