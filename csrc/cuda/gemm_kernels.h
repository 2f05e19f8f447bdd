// The kernels that are compiled, by name. gemm_*.cu instantiate them, gemm_table.h describes them, and the tests run
// them on the host.
#pragma once

#include "gemm_decode.h"
#include "gemm_tiled.h"
#include "gemm_wgmma.h"

namespace resq::cuda {

// X(name, shape): m = tokens, n = channels of a CTA; "split": several CTAs may share a tile.
#define RESQ_DECODE_KERNELS(X)            \
  X(decode_m8_n32, DecodeShape<2, 1, 4>)  \
  X(decode_m8_n64, DecodeShape<4, 1, 4>)  \
  X(decode_m16_n32, DecodeShape<2, 2, 4>) \
  X(decode_m16_n64, DecodeShape<4, 2, 3>)

#define RESQ_TILED_KERNELS(X)                                   \
  X(tiled_m32_n128, TiledShape<2, 4, 4, 1, 4, false>)            \
  X(tiled_m32_n128_split, TiledShape<2, 4, 4, 1, 4, true>)      \
  X(tiled_m64_n128_split, TiledShape<2, 8, 4, 1, 4, true>)      \
  X(tiled_m128_n128_split, TiledShape<2, 8, 4, 2, 3, true>)     \
  X(tiled_m64_n128, TiledShape<2, 8, 4, 1, 4, false>)           \
  X(tiled_m128_n128, TiledShape<2, 8, 4, 2, 3, false>)

// "s4": 4-bit weights meet 4-bit codes in the 4-bit instruction of sm_80, sm_86 and sm_89.
#define RESQ_INT4_KERNELS(X)                                           \
  X(tiled_m64_n128_s4, TiledShape<2, 8, 4, 1, 4, false, true>)         \
  X(tiled_m128_n128_s4, TiledShape<2, 8, 4, 2, 3, false, true>)

#define RESQ_WGMMA_KERNELS(X)            \
  X(wgmma_m64_n128, WgmmaShape<64, 7>)   \
  X(wgmma_m128_n128, WgmmaShape<128, 6>)

}  // namespace resq::cuda
