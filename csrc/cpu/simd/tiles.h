// AMX tiles: a configuration that lasts for a scope, and the instructions with tile numbers as template arguments.
#pragma once

#include "vec.h"

namespace resq {
namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the calling thread's tiles. Released at the end, so that context switches do not save 8 KiB of them.
class TileScope {
 public:
  explicit TileScope(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// g++'s intrinsics do not say that they read memory. tile_load does not either, so that it may move between unrelated
// stores: a fence stands where a buffer has been filled.
RESQ_INLINE void tile_fence() { asm volatile("" ::: "memory"); }
template <int T>
RESQ_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
RESQ_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride));
}
// The same for data that will not be read again soon: it is not kept in the L1 cache at others' cost.
template <int T>
RESQ_INLINE void tile_stream(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride));
}
template <int T>
RESQ_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
// int32 tile C += signed bytes A · unsigned bytes B
template <int C, int A, int B>
RESQ_INLINE void tile_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// float32 tile C += bfloat16 A · bfloat16 B
template <int C, int A, int B>
RESQ_INLINE void tile_bfloats() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace resq
