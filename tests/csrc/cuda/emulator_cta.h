// A CTA on the host: its threads are coroutines of one OS thread, which meet at barriers and see device memory only in
// registered buffers. Shared memory starts as garbage, threads run in random order; divergence where threads must meet,
// deadlock and addresses outside of memory end the program with a word.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define RESQ_DEVICE inline
#define RESQ_EMULATED 1

struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::fflush(stderr);
  std::_Exit(3);
}
inline void require(bool ok, const char* what) {
  if (!ok) fail(what);
}

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

struct Product {
  int32_t* d;
  const uint32_t* a;
  uint64_t descriptor;
  int columns;  // N
  bool accumulate;
};

struct Thread {
  ucontext_t context;
  std::vector<uint8_t> stack;
  bool done = false;
  bool waited = false;  // for the kernel before this one
  const uint64_t* waits_on = nullptr;  // runs again when *waits_on differs from waited_value
  uint64_t waited_value = 0;
  std::vector<std::vector<Copy>> copies;  // committed groups, then the open one
  std::vector<std::vector<Product>> products;
};

// A meeting of some threads: the last to arrive acts for all.
struct Meeting {
  uint64_t generation = 0;
  int arrived = 0;
  const char* what = nullptr;
  std::vector<void*> operands;
};

struct Mbarrier {
  uint64_t phase = 0;
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;
};

struct Late {
  std::function<void()> run;
};

struct Cta {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<uint8_t> shared;
  Meeting all;
  std::vector<Meeting> warps, groups;  // 32 and 128 threads
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<Late> engine;  // copies under way
  ucontext_t scheduler;
  int current = 0, block_x = 0, block_y = 0, grid_x = 1;
  std::mt19937 random{1};
  uint64_t conflicts = 0, matrix_loads = 0;
};

inline Cta* cta = nullptr;
// Device memory that the kernel sees. `constant`: nothing writes it between launches, so that it may be read while the
// kernel before this one still runs.
struct Buffer {
  const uint8_t* start;
  size_t size;
  bool constant;
};
inline std::vector<Buffer> buffers;

enum class Access { read, write, constant };  // constant: a read of what no kernel writes

inline void check_global(const void* p, size_t bytes, Access access) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  require(reinterpret_cast<uintptr_t>(p) % bytes == 0, "misaligned access to device memory");
  for (const Buffer& buffer : buffers) {
    if (at < buffer.start || at + bytes > buffer.start + buffer.size) continue;
    require(!(access == Access::write && buffer.constant), "a store to constant memory");
    require(access != Access::constant || buffer.constant, "a load by the read-only path of what a kernel writes");
    return;
  }
  fail("access to device memory outside of every buffer");
}
// The same by the thread that runs: memory that is not constant only after the kernel before this one has ended.
inline void check_order(const void* p) {
  if (cta->threads[cta->current]->waited) return;
  const uint8_t* at = static_cast<const uint8_t*>(p);
  for (const Buffer& buffer : buffers)
    require(buffer.constant || at < buffer.start || at >= buffer.start + buffer.size,
            "memory of the kernel before this one is used before it has ended");
}
inline uint8_t* shared_at(uint32_t at, uint32_t bytes) {
  require(at % std::min(bytes, 16u) == 0, "misaligned access to shared memory");
  require(at + bytes <= cta->shared.size(), "access beyond shared memory");
  return cta->shared.data() + at;
}

inline void perform(const Copy& c) {
  uint8_t* to = shared_at(c.to, 16);
  std::memset(to, 0, 16);
  if (!c.bytes) return;
  check_global(c.from, 16, Access::read);
  std::memcpy(to, c.from, 16);
}

inline Thread& self() { return *cta->threads[cta->current]; }
// Said at the end of a kernel that may start before the one before it has ended.
inline void require_waited() { require(self().waited, "a thread ended without waiting for the kernel before"); }
inline void suspend(const uint64_t* on) {
  self().waits_on = on;
  self().waited_value = *on;
  swapcontext(&self().context, &cta->scheduler);
}
// All `count` threads of the meeting come with an operand; `act` sees them in thread order.
template <class F>
void meet(Meeting& m, int index, int count, const char* what, void* operand, F act) {
  if (m.arrived == 0) m.what = what, m.operands.assign(count, nullptr);
  require(m.what == what, "threads of one warp diverge");
  m.operands[index] = operand;
  if (++m.arrived == count) {
    act(m.operands);
    m.arrived = 0;
    ++m.generation;
  } else {
    suspend(&m.generation);
  }
}
template <class F>
void meet_warp(const char* what, void* operand, F act) {
  meet(cta->warps[cta->current / 32], cta->current % 32, 32, what, operand, act);
}
template <class F>
void meet_group(const char* what, void* operand, F act) {
  meet(cta->groups[cta->current / 128], cta->current % 128, 128, what, operand, act);
}

inline void complete(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.arrivals;
  }
}
inline Mbarrier& mbarrier(uint32_t at) {
  require(cta->mbarriers.count(at) != 0, "an mbarrier was not initialised");
  return cta->mbarriers[at];
}

inline void run_late(bool all) {
  while (!cta->engine.empty()) {
    const size_t i = cta->random() % cta->engine.size();
    auto run = cta->engine[i].run;
    cta->engine.erase(cta->engine.begin() + static_cast<long>(i));
    run();
    if (!all) return;
  }
}

inline std::function<void()> body;
inline void entry() {
  body();
  self().done = true;
  swapcontext(&self().context, &cta->scheduler);
}

inline void run_cta() {
  size_t left = cta->threads.size();
  std::vector<int> order(left);
  for (size_t i = 0; i < left; ++i) order[i] = static_cast<int>(i);
  while (left) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), cta->random);
    for (int i : order) {
      Thread& t = *cta->threads[i];
      if (t.done || (t.waits_on && *t.waits_on == t.waited_value)) continue;
      t.waits_on = nullptr;
      cta->current = i;
      swapcontext(&cta->scheduler, &t.context);
      progress = true;
      left -= t.done;
    }
    if (!cta->engine.empty() && (!progress || cta->random() % 4 == 0)) run_late(false), progress = true;
    require(progress, "deadlock");
  }
  require(cta->engine.empty(), "a copy was still under way at the end");
}

// Runs `kernel` for every CTA of the grid. Returns the extra cycles of bank conflicts of ldmatrix.
inline uint64_t launch(int grid_x, int grid_y, int threads, int shared_bytes, uint32_t seed,
                       const std::function<void()>& kernel) {
  Cta c;
  cta = &c;
  body = kernel;
  c.random.seed(seed);
  c.grid_x = grid_x;
  c.shared.resize(shared_bytes);
  std::vector<std::pair<int, int>> places;
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) places.push_back({x, y});
  std::shuffle(places.begin(), places.end(), c.random);
  for (int i = 0; i < threads; ++i) {
    c.threads.push_back(std::make_unique<Thread>());
    c.threads.back()->stack.resize(64 << 10);
  }
  for (const auto& [x, y] : places) {
    c.block_x = x, c.block_y = y;
    for (uint8_t& byte : c.shared) byte = static_cast<uint8_t>(c.random());
    c.all = Meeting{};
    c.warps.assign(threads / 32, Meeting{});
    c.groups.assign((threads + 127) / 128, Meeting{});
    c.mbarriers.clear();
    for (auto& thread : c.threads) {
      thread->done = thread->waited = false, thread->waits_on = nullptr;
      thread->copies.assign(1, {});
      thread->products.assign(1, {});
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.data();
      thread->context.uc_stack.ss_size = thread->stack.size();
      thread->context.uc_link = &c.scheduler;
      makecontext(&thread->context, entry, 0);
    }
    run_cta();
    for (const auto& thread : c.threads)
      for (const auto& group : thread->products) require(group.empty(), "a wgmma was never waited for");
  }
  cta = nullptr;
  return c.conflicts;
}

// Extra cycles of one 16-byte access by 8 threads: those of the fullest bank group, less one.
inline void count_conflicts(const uint32_t* at) {
  int load[8] = {};
  for (int i = 0; i < 8; ++i) ++load[at[i] / 16 % 8];
  cta->conflicts += static_cast<uint64_t>(*std::max_element(load, load + 8) - 1);
  ++cta->matrix_loads;
}

}  // namespace emulator
