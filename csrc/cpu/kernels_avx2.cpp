// The kernels for AVX2 with FMA and F16C. The pragma comes after the standard headers, so that their inline functions
// keep the baseline instruction set, and before <immintrin.h>, whose intrinsics need the wider one.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#include <immintrin.h>
#define RESQ_TU_AVX2
#include "simd/table.h"

namespace resq {
constexpr Kernels kAvx2Table = make_kernels<Reading::side_by_side>("avx2");
const Kernels kAvx2Kernels = kAvx2Table;
}  // namespace resq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
