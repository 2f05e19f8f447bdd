// Threads that run loops together: torch's pool for a loop alone, a Team for the many short ones of a decode step.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

namespace resq {

// Threads that can run at once, however many were asked for.
inline int64_t usable_threads() {
  static const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return std::min(static_cast<int64_t>(torch::stable::get_num_threads()), cores);
}

// What is read next, for threads that have nothing to do: of `count` pieces, thread w of n begins with w·count/n.
struct Next {
  const uint8_t* data = nullptr;
  int64_t piece = 0, count = 0;  // bytes of a piece; pieces
};

// A thread that leads, and others that stay with it from loop to loop. libgomp's fork and join wait for every thread, also
// for one whose core something else has taken. Here a thread joins a loop when it sees it, and only those inside are waited
// for: loops share their work so that none need come (share.h). Between loops they fetch what the next one reads.
class Team {
 public:
  // body(), whose loops run on usable_threads(). Exceptions of body and of loops come out as they are.
  template <typename Body>
  static void keep(const Body& body) {
    const int64_t threads = usable_threads();
    if (here_ || threads < 2) return body();
    Team team;
    std::exception_ptr thrown;  // torch would say that a loop failed, and not why
    torch::stable::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
      if (worker) return team.follow(worker, threads);
      here_ = &team;
      try {
        body();
      } catch (...) {
        thrown = std::current_exception();
      }
      here_ = nullptr;
      team.gate_.store(kDismissed, std::memory_order_release);
    });
    if (thrown) std::rethrow_exception(thrown);
  }

  // The team that this thread leads, or null.
  static Team* here() { return here_; }

  // job(w) for w = 0 here, and for those of 1 … workers − 1 who come before that ends.
  template <typename Job>
  void loop(int64_t workers, const Job& job, const Next& next) {
    lead(workers, {&job, [](const void* job, int64_t w) { (*static_cast<const Job*>(job))(w); }, next});
  }

 private:
  struct Call {
    const void* job = nullptr;
    void (*run)(const void*, int64_t) = nullptr;
    Next next;
  };

  void lead(int64_t workers, const Call& call);
  void follow(int64_t worker, int64_t threads);
  void run(int64_t worker);

  static thread_local Team* here_;

  // The loop's number, who may join it, whether it is open, and how many are inside.
  static constexpr uint64_t kInside = 0x7fff, kOpen = 1 << 15, kDismissed = uint64_t{1} << 31;
  static constexpr int kWorkers = 16, kNumber = 32;
  alignas(64) std::atomic<uint64_t> gate_{0};
  uint64_t number_ = 0;
  alignas(64) Call call_;  // does not change while someone is inside
  std::atomic<bool> failed_{false};
  std::exception_ptr thrown_;
};

// job(w) for w in [0, workers), on the team of this thread or on torch's pool; on a team perhaps for fewer. `next`: what is
// read after it.
template <typename Job>
void on_threads(int64_t workers, const Job& job, const Next& next = {}) {
  if (Team* team = Team::here()) return team->loop(workers, job, next);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) job(w);
  });
}

}  // namespace resq
