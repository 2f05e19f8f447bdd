// Calling a kernel with more shared memory than the default, and its outcome.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace resq::cuda {

inline const char* outcome(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Kernel>
const char* launch(Kernel kernel, int64_t ctas, int threads, int64_t shared, const QuantizeArgs& args,
                   cudaStream_t stream) {
  if (shared > 48 * 1024) {  // more than every kernel may use without asking
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return outcome(error);
  }
  kernel<<<static_cast<unsigned>(ctas), threads, shared, stream>>>(args);
  return outcome(cudaGetLastError());
}

}  // namespace resq::cuda
