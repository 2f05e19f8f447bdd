// What the launchers of the GEMM kernels share.
#pragma once

#include "gemm_launch.h"
#include "launch_common.cuh"

namespace resq::cuda {

// Shared memory that a CTA may have on every chip from sm_80 (sm_86 and sm_89 have the least), and on Hopper.
constexpr int kSharedEverywhere = 99 << 10, kSharedHopper = 227 << 10;

// The kernel's numbers in gemm_table.h are those of its shape.
template <class S>
constexpr bool matches(const KernelInfo& k, int quads, bool whole, bool split) {
  static_assert(S::kSharedBytes <= (S::kThreads == 384 ? kSharedHopper : kSharedEverywhere));
  return k.tokens == S::kTokens && k.channels == S::kChannels && k.quads == quads && k.whole == whole && k.split == split &&
         k.ctas == S::kCtas && k.shared == S::kSharedBytes;
}

}  // namespace resq::cuda
