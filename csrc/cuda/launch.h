// The launchers that the torch bindings call: plain C++ without headers of torch or CUDA. Each queues one kernel on the
// stream and returns null, or the CUDA runtime's words for what went wrong.
#pragma once

#include "../cpu/kernels.h"
#include "quantize_args.h"

using cudaStream_t = struct CUstream_st*;

namespace resq::cuda {

struct ContiguousArgs;

// The CUDA runtime that this library was linked with, as 1000·major + 10·minor.
int runtime_version();

// The newest CUDA version that the installed driver supports, in the same form; 0 without a driver.
int driver_version();

// Whether the current device runs code of this library that has device.h's wait_for_previous_kernel: it was compiled for
// 9.0 or later. Only then may a kernel be launched so that it starts while the kernel before it ends.
bool kernels_overlap();

// Largest dynamic shared memory a CTA of the current device may ask for, bytes.
int64_t shared_memory_limit();

// Quantizes the rows as they are (weight null) or after RMSNorm, which adds `residual` first where that is not null.
const char* launch_quantize(const QuantizeArgs& args, DType dtype, cudaStream_t stream);

// The same for rows that contiguous_rows takes; launch_quantize finds them itself.
const char* launch_quantize_contiguous(const ContiguousArgs& args, int rows, DType dtype, cudaStream_t stream);

// Block Hadamard transform of x or of silu(gate)·up, then quantization, or the values where args.out is not null.
const char* launch_hadamard(const QuantizeArgs& args, DType dtype, cudaStream_t stream);

// Dynamic shared memory that the launches ask for, bytes.
int64_t quantize_shared(const QuantizeArgs& args, DType dtype);
int64_t hadamard_shared(const QuantizeArgs& args);

}  // namespace resq::cuda
