#include "launch_common.cuh"
#include "quantize_contiguous.cuh"

namespace resq::cuda {
namespace {

template <class T, int kHeld>
const char* run(const ContiguousArgs& args, int rows, cudaStream_t stream) {
  const int threads = contiguous_threads(args.vectors, kHeld);
  if (args.weight)
    contiguous_kernel<T, kHeld, true><<<rows, threads, kContiguousShared, stream>>>(args);
  else
    contiguous_kernel<T, kHeld, false><<<rows, threads, kContiguousShared, stream>>>(args);
  return outcome(cudaGetLastError());
}

template <class T>
const char* run(const ContiguousArgs& args, int rows, cudaStream_t stream) {
  return held_vectors(rows, args.vectors) == 1 ? run<T, 1>(args, rows, stream) : run<T, kHeldVectors>(args, rows, stream);
}

}  // namespace

const char* launch_quantize_contiguous(const ContiguousArgs& args, int rows, DType dtype, cudaStream_t stream) {
  return dtype == DType::f16 ? run<f16_t>(args, rows, stream) : run<bf16_t>(args, rows, stream);
}

}  // namespace resq::cuda
