// The functions of csrc/cuda/kv_device.h on the host, from the PTX ISA as emulator.h.
#pragma once

#include <cmath>

#include "emulator.h"

struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace emulator {

// "Matrix fragments for mma.m16n8k16", bf16: of lane l, group g = l / 4, q = l % 4, a_i: row g + 8 ((i / 2) % 2), column
// 2q + i % 2 + 8 (i / 4); b_i: row (k) 2q + i % 2 + 8 (i / 2), column g; c_i: row g + 8 (i / 2), column 2q + i % 2.
struct FloatFragments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
inline float bf16_half(uint32_t pair, int which) {
  const uint32_t bits = (which ? pair >> 16 : pair & 0xffff) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline void multiply_float_fragments(const std::vector<void*>& lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const FloatFragments& f = *static_cast<FloatFragments*>(lanes[l]);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][2 * q + i % 2 + 8 * (i / 4)] = bf16_half(f.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[2 * q + i % 2 + 8 * (i / 2)][g] = bf16_half(f.b[i / 2], i % 2);
  }
  for (int l = 0; l < 32; ++l) {
    const FloatFragments& f = *static_cast<FloatFragments*>(lanes[l]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) f.d[i] += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
  }
}

struct Passed {
  uint32_t value, result;
  int from;
};
// Every lane gets the value of lane `from`.
inline uint32_t pass(const char* what, uint32_t value, int from) {
  Passed mine{value, 0, from};
  meet_warp(what, &mine, [](const std::vector<void*>& lanes) {
    for (void* lane : lanes) {
      Passed& one = *static_cast<Passed*>(lane);
      one.result = static_cast<Passed*>(lanes[one.from])->value;
    }
  });
  return mine.result;
}

}  // namespace emulator

namespace resq::cuda {

inline uint2 shared_load_8(uint32_t at) {
  uint2 v;
  std::memcpy(&v, emulator::shared_at(at, 8), 8);
  return v;
}
inline uint32_t shared_load_4(uint32_t at) {
  uint32_t v;
  std::memcpy(&v, emulator::shared_at(at, 4), 4);
  return v;
}
inline uint32_t shared_load_2(uint32_t at) {
  uint16_t v;
  std::memcpy(&v, emulator::shared_at(at, 2), 2);
  return v;
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::FloatFragments mine{d, a, {b0, b1}};
  emulator::meet_warp("mma bf16", &mine, emulator::multiply_float_fragments);
}

inline uint32_t transpose_matrix(uint32_t v) {
  struct Element {
    uint32_t v, t;
  } mine{v, 0};
  emulator::meet_warp("movmatrix", &mine, [](const std::vector<void*>& lanes) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * (l % 4) + i, column = l / 4;  // in the matrix as it came
        const uint32_t pair = static_cast<Element*>(lanes[4 * row + column / 2])->v;
        static_cast<Element*>(lanes[l])->t |= (column % 2 ? pair >> 16 : pair & 0xffff) << (16 * i);
      }
  });
  return mine.t;
}

inline float from_lane(float v, int lane) {
  return float_of_bits(static_cast<int32_t>(emulator::pass("shfl", bits_of_float(v), lane)));
}
inline float from_lane_xor(float v, int mask) { return from_lane(v, (thread_index() & 31) ^ mask); }
inline float exp2_of(float v) { return std::exp2(v); }
inline float log2_of(float v) { return std::log2(v); }
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t bfloat_pair(float first, float second) { return bfloat_bits(first) | bfloat_bits(second) << 16; }

}  // namespace resq::cuda
