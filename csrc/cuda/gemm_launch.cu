// The current chip, and from a choice to its family's launcher.
#include "gemm_launch_common.cuh"

namespace resq::cuda {

const char* current_chip(int device, Chip& chip) {
  static thread_local Chip known[64];
  Chip& k = known[device & 63];
  if (!k.arch) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&k.processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&k.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error != cudaSuccess) return outcome(error);
    k.arch = 10 * major + minor;
  }
  chip = k;
  return nullptr;
}

const char* launch_gemm(const Choice& choice, const Chip& chip, const GemmArgs& args, cudaStream_t stream) {
  const bool overlap = kernels_overlap();
  switch (kKernels[choice.kernel].family) {
    case Family::decode: return launch_decode(choice.kernel, overlap, args, stream);
    case Family::tiled: return launch_tiled(choice.kernel, overlap, args, stream);
    case Family::int4: return launch_int4(choice.kernel, args, stream);
    default: return launch_wgmma(choice.kernel, chip.processors, args, stream);
  }
}

}  // namespace resq::cuda
