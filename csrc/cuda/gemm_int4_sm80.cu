#include "gemm_kernels.h"
#include "gemm_launch_common.cuh"

namespace resq::cuda {
namespace {

template <class S>
__global__ __launch_bounds__(S::kThreads, S::kCtas) void int4_kernel(const __grid_constant__ GemmArgs args) {
  // Elsewhere the kernel is empty and never chosen: Chip::int4 is false.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  tiled_gemm<S>(args);
#endif
}

template <class S>
const char* run(const GemmArgs& args, cudaStream_t stream) {
  const dim3 grid((args.n + S::kChannels - 1) / S::kChannels * ((args.m + S::kTokens - 1) / S::kTokens));
  return launch_kernel(int4_kernel<S>, grid, S::kThreads, S::kSharedBytes, false, stream, args);
}

#define RESQ_CHECK(NAME, ...)                                                                                           \
  static_assert(matches<__VA_ARGS__>(kKernels[NAME],                                                                    \
                                     __VA_ARGS__::kTiles * __VA_ARGS__::kTokens8 * __VA_ARGS__::kThreads, true, false));
RESQ_INT4_KERNELS(RESQ_CHECK)

}  // namespace

const char* launch_int4(int32_t kernel, const GemmArgs& args, cudaStream_t stream) {
  switch (kernel) {
#define RESQ_CASE(NAME, ...) \
  case NAME: return run<__VA_ARGS__>(args, stream);
    RESQ_INT4_KERNELS(RESQ_CASE)
    default: return "no such int4 kernel";
  }
}

}  // namespace resq::cuda
