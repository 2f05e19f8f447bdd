// The kernels for AVX-512 with VNNI, and the same with the linear layer on AMX tiles. The pragma comes after the standard
// headers, so that their inline functions keep the baseline instruction set, and before <immintrin.h>, whose intrinsics
// need the wider one. No compiler makes AMX instructions of plain C++, so the tiles need no unit of their own.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#endif
#include <immintrin.h>
#define RESQ_TU_AVX512
#include "simd/amx_int8.h"
#include "simd/table.h"

namespace resq {
constexpr Kernels kAvx512Table = make_kernels<Reading::side_by_side>("avx512_vnni");
const Kernels kAvx512Kernels = kAvx512Table;
const Kernels kAvx512InOrderKernels = make_kernels<Reading::in_order>("avx512_vnni");

constexpr Kernels with_tiles(Kernels table) {
  table.name = "amx_int8";
  table.linear = linear_tiles;
  table.panel_rows = kTilePanelRows;
  return table;
}
constexpr Kernels kAmxTable = with_tiles(kAvx512Table);
const Kernels kAmxKernels = kAmxTable;
}  // namespace resq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
