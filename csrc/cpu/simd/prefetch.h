// Software prefetch of the next page.
#pragma once

#include "vec.h"

namespace resq {
namespace {

// Brings a page near while another is computed, line by line between other work: the hardware's prefetchers stop at
// every 4 KiB, and a burst of lines would wait for the few line buffers. Into L2: a page and the buffers together are
// more than the L1 cache. From memory, decoding takes 1.5 times as long without it.
class Prefetch {
 public:
  void start(const uint8_t* at, int64_t bytes) { at_ = at, end_ = at + bytes; }
  RESQ_INLINE void next() {
    if (at_ >= end_) return;
    _mm_prefetch(at_, _MM_HINT_T1);
    at_ += 64;
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace resq
