// AMX tiles: configuration of the calling thread, and one function an instruction.
#pragma once

#include "vec.h"

namespace resq {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The calling thread's tile unit, configured: another library may have left its own configuration. Released at the
// end, so that context switches do not save 8 KiB of tiles.
struct TileUnit {
  TileUnit() {
    static constexpr TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
};

// Own wrappers: g++'s do not tell the compiler that memory is read, and a clobber here would pin the unpacking.
// `memory_fence` stands where scratch changes hands.
RESQ_INLINE void memory_fence() { asm volatile("" ::: "memory"); }
template <int T>
RESQ_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
RESQ_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride));
}
template <int T>
RESQ_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
// tile C += signed A · unsigned B
template <int C, int A, int B>
RESQ_INLINE void tile_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace resq
