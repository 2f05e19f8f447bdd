#include "launch_common.cuh"
#include "quantize_contiguous.h"
#include "quantize_kernel.cuh"

namespace resq::cuda {
namespace {

template <class T>
const char* run(const QuantizeArgs& args, cudaStream_t stream) {
  const int vectors = (args.columns + kVector - 1) / kVector;
  // Few rows: a thread for every vector, since one CTA's latency is the op's. Many rows: several vectors a thread, so that
  // more CTAs share a processor and hide each other's barriers.
  const int most = args.rows <= 256 ? 1024 : 256;
  const int threads = vectors >= most ? most : (vectors + 31) / 32 * 32;
  return launch(quantize_kernel<T>, args.rows, threads, quantize_shared_bytes(args.columns, sizeof(T), args.staging), args,
                stream);
}

}  // namespace

int64_t quantize_shared(const QuantizeArgs& args, DType dtype) {
  return quantize_shared_bytes(args.columns, dtype == DType::f32 ? 4 : 2, args.staging);
}

const char* launch_quantize(const QuantizeArgs& args, DType dtype, cudaStream_t stream) {
  ContiguousArgs contiguous;
  if (contiguous_rows(args, dtype == DType::f32 ? 4 : 2, contiguous))
    return launch_quantize_contiguous(contiguous, args.rows, dtype, stream);
  switch (dtype) {
    case DType::f32: return run<float>(args, stream);
    case DType::f16: return run<f16_t>(args, stream);
    default: return run<bf16_t>(args, stream);
  }
}

}  // namespace resq::cuda
