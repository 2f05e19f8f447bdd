// Threading of the linear layer: which rows and superblocks run together.
#pragma once

#include "kernels.h"

namespace resq {

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The address of an element of rows of activations.
inline const void* row_address(const void* base, DType dtype, int64_t elements) {
  return static_cast<const uint8_t*>(base) + elements * bytes_of(dtype);
}
inline void* row_address(void* base, DType dtype, int64_t elements) {
  return static_cast<uint8_t*>(base) + elements * bytes_of(dtype);
}

// y [rows, n] for args.plan; `quantize` describes x, its outputs are scratch of this call.
void run_linear(QuantizeArgs quantize, LinearArgs args, int64_t rows);

}  // namespace resq
