// From a run's raw products Σ a·u to its float32 terms (the identity is at the top of gemm_int8.h).
#pragma once

#include "vec.h"

namespace resq {
namespace {

// What makes terms of the products of MR rows with n outputs.
template <int MR>
struct RunTerms {
  const int32_t* weight_sum;  // [n]
  const float* weight_scale;  // [n]
  int64_t n;
  // offset_w·Σa with its sign, and z − o: unsigned, because partial results may leave int32 before the last one brings
  // them back.
  uint32_t start[MR], zero[MR];
  float scale[MR];
  bool first;  // of the token's runs: y is set, not added to
  float* y;    // [MR, width]

  RESQ_INLINE VF of(VU products, VU sum, VF weight, int m) const {
    return to_float((VI)(products + start[m] - sum * zero[m])) * (weight * scale[m]);
  }
  RESQ_INLINE float of(int32_t product, int32_t sum, float weight, int m) const {
    const uint32_t exact = static_cast<uint32_t>(product) + start[m] - static_cast<uint32_t>(sum) * zero[m];
    return static_cast<float>(static_cast<int32_t>(exact)) * (weight * scale[m]);
  }
};

}  // namespace
}  // namespace resq
