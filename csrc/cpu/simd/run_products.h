// The terms of one run for some rows and superblocks: an ISA's micro-kernels, called alike.
#pragma once

#if defined(RESQ_TU_AVX512)
#include "micro_avx512.h"
#elif defined(RESQ_TU_AVX2)
#include "micro_avx2.h"
#else
#include "micro_portable.h"
#endif
#include "run_terms.h"

namespace resq {
namespace {

#if defined(RESQ_TU_AVX512)
// Reads the superblock after `superblock` while `rows` rows are multiplied by this one: the processor's own prefetching
// leaves the first rows of every superblock waiting, a tenth of the time of 64 rows.
RESQ_INLINE Ahead ahead_of(const LinearArgs& args, int64_t superblock, int64_t rows) {
  const PlanView& plan = args.plan;
  if ((superblock + 1) * kSuperblock >= args.n) return {args.packed, 0};
  int64_t groups = 0;
  for (int64_t r = 0; r < plan.n_runs; ++r) groups += plan.runs[r].padded / (plan.runs[r].nibbles ? 8 : 4);
  const int64_t steps = (rows + kMicroRows - 1) / kMicroRows * groups * kAheadSteps;
  return {args.packed + (superblock + 1) * plan.superblock_bytes, min(plan.superblock_bytes / steps + 1, int64_t{64})};
}

// y (+)= the terms of MR rows `a` and S superblocks `w`, which lie `stride` bytes apart.
template <Reading R, int MR, int S>
RESQ_INLINE void add_run(const RunPlace& run, int32_t, const uint8_t* w, int64_t stride, const int8_t* a, int64_t lda,
                         const RunTerms<MR>& terms, Ahead& next) {
  if (run.nibbles) {
    micro_nibbles<MR, S, kAsks<R, MR>>(w, a, lda, run.padded / 8, terms, stride, next);
  } else {
    micro_bytes<MR, S, kAsks<R, MR>>(w, a, lda, run.padded / 4, terms, stride, next);
  }
}
#else
struct Ahead {};
RESQ_INLINE Ahead ahead_of(const LinearArgs&, int64_t, int64_t) { return {}; }

// The same with one superblock, the products passing through memory.
template <Reading, int MR, int S>
void add_run(const RunPlace& run, int32_t act_bits, const uint8_t* w, int64_t, const int8_t* a, int64_t lda,
             const RunTerms<MR>& terms, Ahead&) {
  static_assert(S == 1);
  alignas(64) int32_t acc[MR * kSuperblock];
  if (run.nibbles) {
    micro_nibbles<MR>(w, a, lda, run.padded / 8, acc);
  } else if (act_bits == 4) {
    micro_bytes<MR, true>(w, a, lda, run.padded / 4, acc);
  } else {
    micro_bytes<MR, false>(w, a, lda, run.padded / 4, acc);
  }
  for (int m = 0; m < MR; ++m) {
    const int32_t *products = acc + m * kSuperblock, *sum = terms.weight_sum;
    const float* weight = terms.weight_scale;
    float* y = terms.y + m * kSuperblock;
    int64_t j = 0;
    for (; j + W <= terms.n; j += W) {
      const VF term = terms.of(load_words(products + j), load_words(sum + j), load(weight + j), m);
      store(y + j, terms.first ? term : load(y + j) + term);
    }
    for (; j < terms.n; ++j) {
      const float term = terms.of(products[j], sum[j], weight[j], m);
      y[j] = terms.first ? term : y[j] + term;
    }
  }
}
#endif

}  // namespace
}  // namespace resq
