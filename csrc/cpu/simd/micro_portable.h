// Integer micro-kernels in plain C++: right on every machine, vectorised as far as the compiler can.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr int kMicroRows = 6;
template <Reading, int>
constexpr int kAbreast = 1;

template <int MR>
void micro_nibbles(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  for (int m = 0; m < MR; ++m) {
    int32_t* acc = out + m * 64;
    for (int n = 0; n < 64; ++n) acc[n] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* p = w + g * 256;
      const int8_t* q = a + m * lda + g * 8;
      for (int n = 0; n < 64; ++n) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) sum += (p[4 * n + j] & 15) * q[j] + (p[4 * n + j] >> 4) * q[4 + j];
        acc[n] += sum;
      }
    }
  }
}

template <int MR, bool kNarrow>
void micro_bytes(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
  for (int m = 0; m < MR; ++m) {
    int32_t* acc = out + m * 64;
    for (int n = 0; n < 64; ++n) acc[n] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* p = w + g * 256;
      const int8_t* q = a + m * lda + g * 4;
      for (int n = 0; n < 64; ++n) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) sum += p[4 * n + j] * q[j];
        acc[n] += sum;
      }
    }
  }
}

}  // namespace
}  // namespace resq
