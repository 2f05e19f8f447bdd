// Launching a GEMM kernel whose CTAs may start while the kernel before it ends (device.h: wait_for_previous_kernel).
#pragma once

#include <cuda_runtime.h>

#include "gemm_launch.h"

namespace resq::cuda {

inline const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class... Args>
const char* launch_kernel(void (*kernel)(Args...), dim3 grid, int threads, int shared, bool overlap, cudaStream_t stream,
                          Args... args) {
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return words(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return words(cudaLaunchKernelEx(&config, kernel, args...));
}

// Shared memory that a CTA may have on every chip from sm_80 (sm_86 and sm_89 have the least), and on Hopper.
constexpr int kSharedEverywhere = 99 << 10, kSharedHopper = 227 << 10;

// The kernel's numbers in gemm_table.h are those of its shape.
template <class S>
constexpr bool matches(const KernelInfo& k, int quads, bool whole, bool split) {
  static_assert(S::kSharedBytes <= (S::kThreads == 384 ? kSharedHopper : kSharedEverywhere));
  return k.tokens == S::kTokens && k.channels == S::kChannels && k.quads == quads && k.whole == whole && k.split == split;
}

}  // namespace resq::cuda
