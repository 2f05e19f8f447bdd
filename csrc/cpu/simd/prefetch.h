// Software prefetch of the next chunk of keys.
#pragma once

#include "vec.h"

namespace resq {
namespace {

struct Chunk {
  const uint8_t* page;
  int64_t token, tokens;  // the first within the page; how many, a multiple of 16
};

// Brings a chunk near while those before it are worked on, a line or less at every step, spread evenly over the steps
// that are expected: a burst of lines takes the few line buffers, and loads from L2 wait for memory behind it. A loop of
// 1.11 ms that waits for each line it reads took 1.32 with even steps, 1.53 with bursts of 28 lines, 1.71 with 84. Into
// L2: a page and the buffers together are more than the L1 cache.
class Prefetch {
 public:
  void start(const PageLayout& p, const Chunk& next, int64_t steps) {
    segments_ = segment_ = 0;
    if (!next.page) return open();
    int64_t lines = 0;
    const auto add = [&](int64_t offset, int64_t bytes) {
      if (!bytes) return;
      const uint8_t* from = next.page + offset;
      if (segments_ && from <= list_[segments_ - 1].end + 64) {  // a whole page is one stretch
        lines -= list_[segments_ - 1].lines();
        list_[--segments_].end = from + bytes;
      } else {
        list_[segments_] = {from, from + bytes};
      }
      lines += list_[segments_++].lines();
    };
    const int64_t t = next.token, n = next.tokens;
    add(p.key_low + t * p.low_padded / 2, n * p.low_padded / 2);
    add(p.key_high + t * p.high_padded, n * p.high_padded);
    add(p.value_low + t * p.low_padded / 2, n * p.low_padded / 2);
    add(p.value_high + t * p.high_padded, n * p.high_padded);
    for (int64_t row = 0; row < 2 * p.parts; ++row) add(p.scales + (row * p.tokens + t) * 2, 2 * n);
    for (int64_t row = 0; row < 2 * p.parts; ++row) add(p.zeros + row * p.tokens + t, n);
    rate_ = min(lines * 64 / max(steps, int64_t{1}) + 1, int64_t{64});
    open();
  }

  // A number of steps in registers; a stretch's end is noticed after them.
  class Steps {
   public:
    explicit RESQ_INLINE Steps(Prefetch& p) : prefetch_(p), at_(p.at_), rate_(p.rate_) {}
    RESQ_INLINE ~Steps() {
      prefetch_.at_ = at_;
      if (at_ >= prefetch_.end_) prefetch_.open();
    }
    RESQ_INLINE void step() {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += rate_;
    }

   private:
    Prefetch& prefetch_;
    const uint8_t* at_;
    const int64_t rate_;
  };

  // What is left when the steps were fewer than expected.
  void finish() {
    for (rate_ = 64; more_;) Steps(*this).step();
  }

 private:
  struct Stretch {
    const uint8_t *from, *end;
    int64_t lines() const { return (end - from + 63) / 64; }
  };

  void open() {
    more_ = segment_ < segments_;
    // After the last, steps touch what is near.
    at_ = more_ ? list_[segment_].from : reinterpret_cast<const uint8_t*>(this);
    end_ = more_ ? list_[segment_].end : at_ + 1;
    rate_ = more_ ? rate_ : 0;
    ++segment_;
  }

  const uint8_t* at_ = reinterpret_cast<const uint8_t*>(this);
  const uint8_t* end_ = at_ + 1;
  int64_t rate_ = 0, segments_ = 0, segment_ = 0;  // bytes a step
  bool more_ = false;
  Stretch list_[12];
};

}  // namespace
}  // namespace resq
