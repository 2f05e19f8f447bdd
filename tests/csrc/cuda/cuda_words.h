// CUDA's own words on the emulator's threads, for kernels that are written in them.
#pragma once

#include <cmath>

#define RESQ_DEVICE_EMULATOR "emulator.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {
struct ThreadIndex {
  operator uint32_t() const { return static_cast<uint32_t>(cta->current); }
};
struct BlockIndex {
  operator uint32_t() const { return static_cast<uint32_t>(cta->block_x); }
};
struct BlockSize {
  operator uint32_t() const { return static_cast<uint32_t>(cta->threads.size()); }
};
template <class X>
struct Coordinates {
  X x;
};

struct Exchange {
  uint32_t value, mask, result;
};
template <class F>
uint32_t exchange(const char* what, uint32_t mask, uint32_t value, F result_of) {
  require(mask >> (cta->current % 32) & 1, "a lane is not in its own mask");
  Exchange mine{value, mask, 0};
  meet_warp(what, &mine, [&](const std::vector<void*>& lanes) {
    for (int lane = 0; lane < 32; ++lane) static_cast<Exchange*>(lanes[lane])->result = result_of(lanes, lane);
  });
  return mine.result;
}
inline const Exchange& of(const std::vector<void*>& lanes, int lane) { return *static_cast<const Exchange*>(lanes[lane]); }
}  // namespace emulator

inline const emulator::Coordinates<emulator::ThreadIndex> threadIdx{};
inline const emulator::Coordinates<emulator::BlockIndex> blockIdx{};
inline const emulator::Coordinates<emulator::BlockSize> blockDim{};

inline void __syncthreads() {
  emulator::meet(emulator::cta->all, emulator::cta->current, static_cast<int>(emulator::cta->threads.size()), "barrier",
                 nullptr, [](const auto&) {});
}

inline float __shfl_xor_sync(uint32_t mask, float value, int step) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::exchange("shfl", mask, bits,
                            [step](const auto& lanes, int lane) { return emulator::of(lanes, lane ^ step).value; });
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t __match_any_sync(uint32_t mask, uint32_t value) {
  return emulator::exchange("match", mask, value, [](const auto& lanes, int lane) {
    uint32_t same = 0;
    for (int l = 0; l < 32; ++l) same |= static_cast<uint32_t>(emulator::of(lanes, l).value == emulator::of(lanes, lane).value) << l;
    return same;
  });
}

// Lanes of one mask reduce among themselves; all lanes of the warp come together here.
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return emulator::exchange("redux", mask, value, [](const auto& lanes, int lane) {
    uint32_t most = 0;
    for (int l = 0; l < 32; ++l) {
      if (!(emulator::of(lanes, lane).mask >> l & 1)) continue;
      emulator::require(emulator::of(lanes, l).mask == emulator::of(lanes, lane).mask, "lanes disagree about a mask");
      most = std::max(most, emulator::of(lanes, l).value);
    }
    return most;
  });
}

inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t atomicMax(uint32_t* at, uint32_t value) {
  const uint32_t old = *at;
  *at = std::max(old, value);
  return old;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
