// Work dealt out to the threads of torch's pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace resq {

// Threads that can run at once, however many were asked for.
inline int64_t usable_threads() {
  static const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return std::min(static_cast<int64_t>(torch::stable::get_num_threads()), cores);
}

// body(begin, end) over shares of [0, count) that threads take as they become free: a thread that loses its core for a
// while holds up one share.
template <typename Body>
void share_out(int64_t count, int64_t share, const Body& body) {
  const int64_t workers = std::min(usable_threads(), (count + share - 1) / share);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t begin = next.fetch_add(share, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(count, begin + share));
    }
  });
}

// body(begin, end) over shares of [0, count), for work that is read in order: every thread begins with a stretch of its
// own, of which it takes `step` at a time, and one that is through it helps the others share by share. Where something
// else takes a core for a while, halves dealt out once had one thread wait a sixth of a decode step.
template <typename Prepare, typename Body>
void share_streams(int64_t count, int64_t share, int64_t step, const Prepare& prepare, const Body& body) {
  struct alignas(64) Cursor {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMost = 256;
  const int64_t workers = std::clamp<int64_t>((count + share - 1) / share, 1, std::min(usable_threads(), kMost));
  Cursor cursors[kMost];
  for (int64_t w = 0; w < workers; ++w) {
    cursors[w].next.store(count * w / workers, std::memory_order_relaxed);
    cursors[w].end = count * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      auto prepared = prepare(w == 0);
      for (int64_t i = 0; i < workers; ++i) {
        Cursor& cursor = cursors[(w + i) % workers];
        const int64_t part = i ? share : step;
        for (int64_t at; (at = cursor.next.fetch_add(part, std::memory_order_relaxed)) < cursor.end;)
          body(prepared, at, std::min(cursor.end, at + part));
      }
    }
  });
}

}  // namespace resq
