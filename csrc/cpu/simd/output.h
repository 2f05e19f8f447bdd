// float32 results of a linear layer to its output tensor.
#pragma once

#include "convert.h"

namespace resq {
namespace {

// Whether whole lines of the output go around the caches: its rows must begin at lines.
[[maybe_unused]] RESQ_INLINE bool around_caches(const LinearArgs& args) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(args.out) | static_cast<uintptr_t>(args.out_stride * 2);
  return args.out_past_caches && args.out_dtype == DType::bf16 && places % 64 == 0;
}

#if defined(RESQ_TU_AVX512)
RESQ_INLINE void store_line(void* out, __m512i line, bool around) {
  if (around) {
    _mm512_stream_si512(static_cast<__m512i*>(out), line);
  } else {
    _mm512_storeu_si512(out, line);
  }
}
#endif

// n values of a row from `column` on, which is a multiple of kSuperblock.
RESQ_INLINE void write_row(const LinearArgs& args, bool around, int64_t row, int64_t column, int64_t n, const float* y) {
  void* out = element(args.out, args.out_dtype, row * args.out_stride + column);
#if defined(RESQ_TU_AVX512)
  if (args.out_dtype == DType::bf16 && n % kSuperblock == 0) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t j = 0; j < n; j += 2 * W) store_line(to + j, bfloats(load(y + j), load(y + j + W)), around);
    return;
  }
#endif
  store_row(y, args.out_dtype, n, out);
}

// What went around the caches must be seen before the threads meet.
RESQ_INLINE void finish_writes(bool around) {
#if defined(RESQ_TU_AVX512)
  if (around) _mm_sfence();
#endif
}

}  // namespace
}  // namespace resq
