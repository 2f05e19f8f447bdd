// Attention of many query rows for AVX-512 with BF16, and with AMX tiles (by inline assembly: no target is needed). The
// pragma comes after the standard headers, so that their inline functions keep the baseline instruction set, and before
// <immintrin.h>, whose intrinsics need the wider one.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "attention_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#endif
#include <immintrin.h>
#define RESQ_TU_AVX512
#include "simd/prefill_products.h"

namespace resq {
const AttentionPreparation kPrefillPreparation = {rotation_bytes, split_rotation};
const AttentionKernel kPrefillTiles = prefill_task<Bf16Tiles>;
}  // namespace resq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
