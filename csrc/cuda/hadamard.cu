#include "hadamard_kernel.cuh"
#include "launch_common.cuh"

namespace resq::cuda {
namespace {

template <class T>
const char* run(const QuantizeArgs& args, cudaStream_t stream) {
  const int vectors = (args.columns + kVector - 1) / kVector;
  // Few CTAs: a thread for every vector; many: several vectors a thread, so that more CTAs share a processor.
  const int64_t ctas = static_cast<int64_t>(args.rows) * args.blocks;
  const int most = ctas <= 512 ? kHadamardThreads : 256;
  const int threads = vectors >= most ? most : (vectors + 31) / 32 * 32;
  return launch(hadamard_kernel<T>, ctas, threads, hadamard_shared(args), args, stream, kernels_overlap());
}

}  // namespace

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

bool kernels_overlap() {
  static thread_local signed char known[64];  // 0 not asked, 1 they do, -1 they do not
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  signed char& answer = known[device & 63];
  if (!answer) {
    cudaFuncAttributes code{};
    const cudaError_t error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(hadamard_kernel<float>));
    answer = error == cudaSuccess && code.ptxVersion >= 90 ? 1 : -1;
  }
  return answer > 0;
}

int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
}

int64_t hadamard_shared(const QuantizeArgs& args) {
  return hadamard_shared_bytes(args.columns, args.hadamard_k, args.staging);
}

const char* launch_hadamard(const QuantizeArgs& args, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32: return run<float>(args, stream);
    case DType::f16: return run<f16_t>(args, stream);
    default: return run<bf16_t>(args, stream);
  }
}

}  // namespace resq::cuda
