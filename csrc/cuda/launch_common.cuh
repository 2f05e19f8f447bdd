// Calling a kernel with more shared memory than the default, and its outcome.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace resq::cuda {

inline const char* outcome(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// overlap: the kernel may start while the one before it ends. Every thread of it must then call wait_for_previous_kernel
// (device.h) before it writes to device memory or reads there what any kernel writes.
template <class... Args>
const char* launch_kernel(void (*kernel)(Args...), dim3 grid, int threads, int shared, bool overlap, cudaStream_t stream,
                          Args... args) {
  if (shared > 48 * 1024) {  // more than every kernel may use without asking
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return outcome(error);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return outcome(cudaLaunchKernelEx(&config, kernel, args...));
}

inline const char* launch(void (*kernel)(QuantizeArgs), int64_t ctas, int threads, int64_t shared, const QuantizeArgs& args,
                          cudaStream_t stream, bool overlap = false) {
  return launch_kernel(kernel, dim3(static_cast<unsigned>(ctas)), threads, static_cast<int>(shared), overlap, stream, args);
}

}  // namespace resq::cuda
