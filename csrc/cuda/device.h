// The instructions that kernels use, one function each. On the host a test supplies them (RESQ_DEVICE_EMULATOR), so that
// the kernels' own source runs there, thread by thread. Shared memory is addressed by 32-bit offsets throughout.
#pragma once

#include <cstdint>

#include "formats.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define RESQ_DEVICE __device__ __forceinline__

namespace resq::cuda {

// Raw bytes of a CUtensorMap, a kernel parameter.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

RESQ_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
}

RESQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RESQ_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
RESQ_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
RESQ_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

RESQ_DEVICE void barrier() { __syncthreads(); }
RESQ_DEVICE void warp_barrier() { __syncwarp(); }
RESQ_DEVICE void device_fence() { __threadfence(); }
RESQ_DEVICE uint32_t fetch_increment(uint32_t* counter) { return atomicAdd(counter, 1u); }

// --- memory -----------------------------------------------------------------------------------------------------------
template <class T>
RESQ_DEVICE T load(const T* p) {
  return __ldg(p);
}
// What the kernel before wrote: not through the read-only path, whose loads may move above wait_for_previous_kernel.
template <class T>
RESQ_DEVICE T load_written(const T* p) {
  return *p;
}
template <class T>
RESQ_DEVICE void store(T* p, T v) {
  *p = v;
}
// Past the L1 cache: other CTAs of this launch wrote it.
RESQ_DEVICE int4 load_fresh(const int4* p) { return __ldcg(p); }
RESQ_DEVICE void store_far(int4* p, int4 v) { __stcg(p, v); }

RESQ_DEVICE uint4 shared_load(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
RESQ_DEVICE void shared_store(uint32_t at, int4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 16 bytes to shared memory, of which `bytes` (0 or 16) are read and the others are 0.
RESQ_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
RESQ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
RESQ_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements (8 rows of 16 bytes); lane l gives the address of row l % 8 of matrix l / 8.
RESQ_DEVICE uint4 load_matrices(uint32_t at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// --- tensor cores of every chip from sm_80 ------------------------------------------------------------------------------
// d += a · b: a int8 16 x 32, b uint8 32 x 8.
RESQ_DEVICE void mma_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a · b: a int4 16 x 64, b uint4 64 x 8. One instruction until sm_89; later chips emulate it in a couple of hundred.
RESQ_DEVICE void mma_s4u4(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- launches that overlap (sm_90; elsewhere nothing) -------------------------------------------------------------------
// Waits until the kernel before this one has finished and its stores are visible.
RESQ_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets CTAs of the next kernel start wherever there is room, once every CTA of this one has said so or ended. Only after
// wait_for_previous_kernel: a kernel then overlaps with no other than the one just before it.
RESQ_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- floats ---------------------------------------------------------------------------------------------------------------
// Each rounded on its own, as in reference.py: never contracted to an fma.
RESQ_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
RESQ_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
RESQ_DEVICE float float_of_bits(int32_t v) { return __int_as_float(v); }
RESQ_DEVICE float to_float(int32_t v) { return __int2float_rn(v); }
RESQ_DEVICE uint32_t half_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
RESQ_DEVICE uint32_t bfloat_bits(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
RESQ_DEVICE float half_value(uint16_t v) { return __half2float(__ushort_as_half(v)); }
RESQ_DEVICE float bfloat_value(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }

}  // namespace resq::cuda

#else
#include RESQ_DEVICE_EMULATOR
#endif
