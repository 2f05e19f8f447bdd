// Two 16-bit floats in a word, the first in its low half: the instructions that work on both at once.
#pragma once

#include <type_traits>

#include "scalar.h"

namespace resq::cuda {

template <class T>
constexpr bool kBfloat = std::is_same_v<T, bf16_t>;

template <class T>
RESQ_HD float first_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
RESQ_HD float second_of(uint32_t pair) {
  return kBfloat<T> ? bits_float(pair & 0xffff0000u) : to_float(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T>
RESQ_HD uint32_t pair_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (kBfloat<T>)
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  else
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  return pair;
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

// A sum, rounded once. Rounded to float32 first it is the same: that has two bits more than twice as many.
template <class T>
RESQ_HD uint32_t add_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t sum;  // a · 1 + b: the instruction for a sum is sm_90's
  if constexpr (kBfloat<T>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  return pair_of<T>(first_of<T>(a) + first_of<T>(b), second_of<T>(a) + second_of<T>(b));
#endif
}

// So is a product, of whose factors float32 holds all bits. Where it does not, below 2^-134, bfloat16 has only 0 either way.
template <class T>
RESQ_HD uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t product;  // a · b + (-0), which keeps the sign of a product that is 0
  if constexpr (kBfloat<T>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
#else
  return pair_of<T>(first_of<T>(a) * first_of<T>(b), second_of<T>(a) * second_of<T>(b));
#endif
}

// Of a number and a NaN the number; -0 is less than 0.
template <class T>
RESQ_HD uint32_t min_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t least;
  if constexpr (kBfloat<T>)
    asm("min.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  else
    asm("min.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
#else
  const auto least = [](float x, float y) { return x != x || y < x || (y == x && std::signbit(y)) ? y : x; };
  return pair_of<T>(least(first_of<T>(a), first_of<T>(b)), least(second_of<T>(a), second_of<T>(b)));
#endif
}

// NaN where either is; -0 is less than 0.
template <class T>
RESQ_HD uint32_t max_pairs_or_nan(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t most;
  if constexpr (kBfloat<T>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
#else
  const auto most = [](float x, float y) { return y != y || y > x || (y == x && std::signbit(x)) ? y : x; };
  return pair_of<T>(most(first_of<T>(a), first_of<T>(b)), most(second_of<T>(a), second_of<T>(b)));
#endif
}

// 0 in place of NaNs.
template <class T>
RESQ_HD uint32_t without_nans(uint32_t pair) {
  constexpr uint32_t infinity = kBfloat<T> ? 0x7f80u : 0x7c00u;
  const uint32_t first = (pair & 0x7fffu) > infinity ? 0u : pair & 0xffffu;
  return first | ((pair >> 16 & 0x7fffu) > infinity ? 0u : pair & 0xffff0000u);
}

}  // namespace resq::cuda
