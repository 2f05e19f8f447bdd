// kv_write of whole tiles of a page for AVX-512, and with AMX tiles (by inline assembly: no target is needed). The
// pragma comes after the standard headers, so that their inline functions keep the baseline instruction set, and before
// <immintrin.h>, whose intrinsics need the wider one.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "attention_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include <immintrin.h>
#define RESQ_TU_AVX512
#include "simd/kv_write_tile.h"

namespace resq {
const KVTileWriter kFloatTileWriter = {write_tiles_float, nullptr, nullptr};
const KVTileWriter kAmxTileWriter = {write_tiles_amx, split_bytes, split_transposed};
}  // namespace resq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
