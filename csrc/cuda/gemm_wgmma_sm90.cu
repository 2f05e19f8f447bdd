#include <cuda.h>

#include "gemm_kernels.h"
#include "gemm_launch_common.cuh"

namespace resq::cuda {
namespace {

template <class S>
__global__ __launch_bounds__(S::kThreads, S::kCtas) void wgmma_kernel(const __grid_constant__ GemmArgs args,
                                                                      const __grid_constant__ TensorMap codes) {
  // Elsewhere the kernel is empty and never chosen: Chip::wgmma is false.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wgmma_gemm<S>(args, &codes);
#endif
}

// cuTensorMapEncodeTiled through the runtime, so that the library needs no libcuda to load.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

template <class S>
const char* run(int processors, const GemmArgs& args, cudaStream_t stream) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  if (!encoder()) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
  alignas(64) CUtensorMap map;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(args.pitch), static_cast<cuuint64_t>(args.m)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(args.pitch)};
  const cuuint32_t box[2] = {S::kColumnBytes, S::kTokens}, step[2] = {1, 1};
  const CUresult result = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(args.codes), size, stride,
                                    box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled refused the codes";
  TensorMap copy;
  __builtin_memcpy(&copy, &map, sizeof(map));
  const int64_t tiles = tiles_of(kKernels[S::kTokens == 64 ? wgmma_m64_n128 : wgmma_m128_n128], args.m, args.n);
  const dim3 grid(static_cast<unsigned>(tiles < processors ? tiles : processors));
  return launch_kernel(wgmma_kernel<S>, grid, S::kThreads, S::kSharedBytes, true, stream, args, copy);
}

#define RESQ_CHECK(NAME, ...) static_assert(matches<__VA_ARGS__>(kKernels[NAME], 0, true, false));
RESQ_WGMMA_KERNELS(RESQ_CHECK)

}  // namespace

const char* launch_wgmma(int32_t kernel, int processors, const GemmArgs& args, cudaStream_t stream) {
  switch (kernel) {
#define RESQ_CASE(NAME, ...) \
  case NAME: return run<__VA_ARGS__>(processors, args, stream);
    RESQ_WGMMA_KERNELS(RESQ_CASE)
    default: return "no such wgmma kernel";
  }
}

}  // namespace resq::cuda
