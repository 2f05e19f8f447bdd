// The instructions of the attention kernel beyond device.h; on the host a test supplies them.
#pragma once

#include "device.h"

#if defined(__CUDACC__)

namespace resq::cuda {

RESQ_DEVICE uint2 shared_load_8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
RESQ_DEVICE uint32_t shared_load_4(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
RESQ_DEVICE uint32_t shared_load_2(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

// d += a · b: a bf16 16 x 16, b bf16 16 x 8, d float32.
RESQ_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8x8 matrix of 16-bit elements, lane l with columns 2 (l % 4) and the next of row l / 4, transposed.
RESQ_DEVICE uint32_t transpose_matrix(uint32_t v) {
  uint32_t t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}

RESQ_DEVICE float from_lane(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
RESQ_DEVICE float from_lane_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

RESQ_DEVICE float exp2_of(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}
RESQ_DEVICE float log2_of(float v) { return __log2f(v); }

// (word & mask) | bits in one instruction: left alone, the compiler makes two with a constant each.
RESQ_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word), "r"(mask), "r"(bits));
  return v;
}

// Two floats as bf16, the first in the low half.
RESQ_DEVICE uint32_t bfloat_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

}  // namespace resq::cuda

#else
#include "emulator_kv.h"
#endif
