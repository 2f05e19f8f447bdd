// float32 and int32 vectors of the TU's width, by the compilers' vector extensions: one source for every ISA.
#pragma once

namespace resq {
namespace {

#if defined(RESQ_TU_AVX512)
constexpr int W = 16;
#elif defined(RESQ_TU_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef int8_t VB __attribute__((vector_size(W)));
// The same types for memory that is neither aligned nor of that type.
typedef float VFMem __attribute__((vector_size(4 * W), aligned(1), may_alias));
typedef int32_t VIMem __attribute__((vector_size(4 * W), aligned(1), may_alias));
typedef uint32_t VUMem __attribute__((vector_size(4 * W), aligned(1), may_alias));
typedef uint16_t VHMem __attribute__((vector_size(2 * W), aligned(1), may_alias));
typedef int8_t VBMem __attribute__((vector_size(W), aligned(1), may_alias));
typedef int32_t IntMem __attribute__((aligned(1), may_alias));

#define RESQ_INLINE inline __attribute__((always_inline))

RESQ_INLINE VF load(const float* p) { return *reinterpret_cast<const VFMem*>(p); }
RESQ_INLINE void store(float* p, VF v) { *reinterpret_cast<VFMem*>(p) = v; }
RESQ_INLINE VU load_words(const void* p) { return *reinterpret_cast<const VUMem*>(p); }
#if defined(RESQ_TU_AVX512)
RESQ_INLINE __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= W ? 0xFFFF : n > 0 ? (1u << n) - 1 : 0);
}

// The first n lanes from memory, 0 in the others.
RESQ_INLINE VF load_part(const float* x, int64_t n) { return (VF)_mm512_maskz_loadu_ps(first_lanes(n), x); }
#endif
RESQ_INLINE VF splat(float x) { return x - VF{}; }
RESQ_INLINE VI splat(int32_t x) { return x - VI{}; }
RESQ_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }

#if defined(RESQ_TU_AVX512)
RESQ_INLINE VF min(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
RESQ_INLINE VF max(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(RESQ_TU_AVX2)
RESQ_INLINE VF min(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
RESQ_INLINE VF max(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
#else
RESQ_INLINE VF min(VF a, VF b) { return a < b ? a : b; }
RESQ_INLINE VF max(VF a, VF b) { return a > b ? a : b; }
#endif
RESQ_INLINE VI min(VI a, VI b) { return a < b ? a : b; }
RESQ_INLINE VI max(VI a, VI b) { return a > b ? a : b; }
RESQ_INLINE float min(float a, float b) { return a < b ? a : b; }
RESQ_INLINE float max(float a, float b) { return a > b ? a : b; }
RESQ_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
RESQ_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
RESQ_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// a·b + c, fused where the ISA has it. Plain expressions are never fused (-ffp-contract=off), so that whatever must
// equal torch bit for bit does on every ISA.
RESQ_INLINE VF fma(VF a, VF b, VF c) {
#if defined(RESQ_TU_AVX512)
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(RESQ_TU_AVX2)
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Lane i of the result is lane i ^ H of v.
template <int H>
RESQ_INLINE VF swap_lanes(VF v) {
#if defined(__clang__)
  VF r;
  for (int i = 0; i < W; ++i) r[i] = v[i ^ H];
  return r;
#else
  VI index;
  for (int i = 0; i < W; ++i) index[i] = i ^ H;
  return __builtin_shuffle(v, index);
#endif
}

template <int H = W / 2>
RESQ_INLINE float reduce_max(VF v) {
  v = max(v, swap_lanes<H>(v));
  if constexpr (H > 1) {
    return reduce_max<H / 2>(v);
  } else {
    return v[0];
  }
}

template <int H = W / 2>
RESQ_INLINE float reduce_min(VF v) {
  v = min(v, swap_lanes<H>(v));
  if constexpr (H > 1) {
    return reduce_min<H / 2>(v);
  } else {
    return v[0];
  }
}

template <int H = W / 2>
RESQ_INLINE float reduce_add(VF v) {
  v = v + swap_lanes<H>(v);
  if constexpr (H > 1) {
    return reduce_add<H / 2>(v);
  } else {
    return v[0];
  }
}

// 1.5 * 2^23: adding it to |x| < 2^22 leaves x, rounded half to even, in the low bits of the mantissa.
constexpr float kRoundMagic = 12582912.0f;
constexpr int32_t kRoundMagicBits = 0x4B400000;

RESQ_INLINE VI round_to_int(VF v) { return (VI)(v + kRoundMagic) - kRoundMagicBits; }
RESQ_INLINE int32_t round_to_int(float v) {
  v += kRoundMagic;
  int32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits - kRoundMagicBits;
}

}  // namespace
}  // namespace resq
