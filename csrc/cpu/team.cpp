#include "team.h"

#include <utility>

namespace resq {
namespace {

constexpr int64_t kNextBytes = 128 << 10;  // that are fetched ahead, of an L2 cache's 256 KiB and more
constexpr int64_t kLinesAtOnce = 4;        // between two looks at the gate
// Looks at the gate, some 40 ns each, before a thread lets others have its core.
constexpr int64_t kPatience = 1 << 14;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a thread does between two looks at the gate: it fetches some lines of its stretch of what is read next.
class Fetch {
 public:
  Fetch() = default;
  Fetch(const Next& next, int64_t worker, int64_t threads) {
    const int64_t first = next.count * worker / threads, last = next.count * (worker + 1) / threads;
    at_ = next.data + first * next.piece;
    end_ = at_ + std::min(kNextBytes, (last - first) * next.piece);
  }
  void wait(int64_t looks) {
    if (looks > kPatience) return std::this_thread::yield();
    if (at_ >= end_) return pause();
    for (int64_t line = 0; line < kLinesAtOnce; ++line, at_ += 64) __builtin_prefetch(at_, 0, 2);  // into L2
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

}  // namespace

thread_local Team* Team::here_ = nullptr;

void Team::run(int64_t worker) {
  try {
    call_.run(call_.job, worker);
  } catch (...) {
    if (!failed_.exchange(true)) thrown_ = std::current_exception();
  }
}

void Team::lead(int64_t workers, const Call& call) {
  if (workers < 2) return call.run(call.job, 0);
  call_ = call;
  gate_.store(++number_ << kNumber | static_cast<uint64_t>(workers) << kWorkers | kOpen, std::memory_order_release);
  run(0);
  gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  Fetch fetch(call.next, 0, workers);
  for (int64_t looks = 0; gate_.load(std::memory_order_acquire) & kInside; ++looks) fetch.wait(looks);
  if (failed_.exchange(false)) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

void Team::follow(int64_t worker, int64_t threads) {
  Fetch fetch;
  uint64_t last = 0;
  for (int64_t looks = 0;; ++looks) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    if (gate & kDismissed) return;
    if (!(gate & kOpen) || gate >> kNumber == last) {
      fetch.wait(looks);
      continue;
    }
    if (static_cast<int64_t>(gate >> kWorkers & kInside) <= worker) {
      last = gate >> kNumber;
    } else if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
      run(worker);
      if (call_.next.data) fetch = Fetch(call_.next, worker, threads);
      last = gate >> kNumber;
      gate_.fetch_sub(1, std::memory_order_release);
    }
    looks = 0;
  }
}

}  // namespace resq
