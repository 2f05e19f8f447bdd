// The functions of csrc/cuda/device.h and hopper.h on the host: a CTA's threads are coroutines of one OS thread.
//
// Written from the PTX ISA, not from the kernels. What hardware does late is done late here too: cp.async copies at once
// or at the wait that covers them, bulk and tensor copies at a random later moment, wgmma at its wait, reading shared memory and
// A registers then. Shared memory starts as garbage, threads run in random order, every access to device memory must lie
// in a registered buffer, and misalignment, divergence in a warp's instruction and deadlock end the program with a word.
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
inline std::vector<std::pair<const uint8_t*, size_t>> buffers;

inline void check_global(const void* p, size_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  require(reinterpret_cast<uintptr_t>(p) % bytes == 0, "misaligned access to device memory");
  for (const auto& [start, size] : buffers)
    if (at >= start && at + bytes <= start + size) return;
  fail("access to device memory outside of every buffer");
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
  check_global(c.from, 16);
  std::memcpy(to, c.from, 16);
}

inline Thread& self() { return *cta->threads[cta->current]; }
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
      thread->done = false, thread->waits_on = nullptr;
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

// PTX ISA, "Matrix fragments for mma.m16n8k32", 8-bit types: of lane l, group g = l / 4, q = l % 4,
// a_i: row g + 8 ((i / 4) % 2), column 4q + i % 4 + 16 (i / 8); b_i: row (k) 4q + i % 4 + 16 (i / 4), column g;
// c_i: row g + 8 (i / 2), column 2q + i % 2.
struct Fragments {
  int32_t* d;
  const uint32_t* a;
  uint32_t b[2];
};
inline void multiply_fragments(const std::vector<void*>& lanes) {
  int8_t a[16][32];
  uint8_t b[32][8];
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = *static_cast<Fragments*>(lanes[l]);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 16; ++i)
      a[g + 8 * (i / 4 % 2)][4 * q + i % 4 + 16 * (i / 8)] = static_cast<int8_t>(f.a[i / 4] >> (8 * (i % 4)));
    for (int i = 0; i < 8; ++i) b[4 * q + i % 4 + 16 * (i / 4)][g] = static_cast<uint8_t>(f.b[i / 4] >> (8 * (i % 4)));
  }
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = *static_cast<Fragments*>(lanes[l]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 32; ++k)
        f.d[i] += static_cast<int32_t>(a[l / 4 + 8 * (i / 2)][k]) * b[k][2 * (l % 4) + i % 2];
  }
}

// The same for mma.m16n8k64 with 4-bit types: a_i: row g + 8 ((i / 8) % 2), column 8q + i % 8 + 32 (i / 16); b_i: row (k)
// 8q + i % 8 + 32 (i / 8), column g; the first element of a register is in its lowest bits.
inline void multiply_nibble_fragments(const std::vector<void*>& lanes) {
  int a[16][64], b[64][8];
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = *static_cast<Fragments*>(lanes[l]);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 32; ++i) {
      const int nibble = f.a[i / 8] >> (4 * (i % 8)) & 15;
      a[g + 8 * (i / 8 % 2)][8 * q + i % 8 + 32 * (i / 16)] = nibble >= 8 ? nibble - 16 : nibble;
    }
    for (int i = 0; i < 16; ++i) b[8 * q + i % 8 + 32 * (i / 8)][g] = f.b[i / 8] >> (4 * (i % 8)) & 15;
  }
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = *static_cast<Fragments*>(lanes[l]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 64; ++k) f.d[i] += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
  }
}

// Byte of a K-major operand in shared memory with 128-byte swizzle: row `row`, byte `k` counted from the descriptor's
// start. Address bits 4..6 are exclusive-ored with bits 7..9 of the address itself.
inline uint8_t swizzled_byte(uint64_t descriptor, int row, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  require(descriptor >> 62 == 1, "the descriptor does not say 128-byte swizzle");
  require((descriptor >> 49 & 7) == 0, "the descriptor has a base offset");
  const uint32_t at = start + row / 8 * stride + row % 8 * 128 + k;
  const uint32_t swizzled = at ^ (((at >> 7) & 7) << 4);
  require(swizzled < cta->shared.size(), "wgmma reads beyond shared memory");
  return cta->shared[swizzled];
}

// wgmma m64nNk32: warp w of the group holds rows 16w..16w+15 of A as in mma.m16n8k32; d[4j + i] is row 16w + g + 8 (i / 2),
// column 8j + 2q + i % 2.
inline void multiply_group(const std::vector<void*>& threads, size_t group, size_t index) {
  std::vector<int8_t> a(64 * 32);
  const Product& any = static_cast<Thread*>(threads[0])->products[group][index];
  const int columns = any.columns;
  for (int t = 0; t < 128; ++t) {
    const Product& p = static_cast<Thread*>(threads[t])->products[group][index];
    require(p.columns == columns && p.descriptor == any.descriptor && p.accumulate == any.accumulate,
            "threads of a warpgroup disagree about a wgmma");
    const int w = t / 32, g = t % 32 / 4, q = t % 4;
    for (int i = 0; i < 16; ++i)
      a[(16 * w + g + 8 * (i / 4 % 2)) * 32 + 4 * q + i % 4 + 16 * (i / 8)] =
          static_cast<int8_t>(p.a[i / 4] >> (8 * (i % 4)));
  }
  std::vector<uint8_t> b(static_cast<size_t>(columns) * 32);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 32; ++k) b[n * 32 + k] = swizzled_byte(any.descriptor, n, k);
  for (int t = 0; t < 128; ++t) {
    const Product& p = static_cast<Thread*>(threads[t])->products[group][index];
    const int w = t / 32, g = t % 32 / 4, q = t % 4;
    for (int j = 0; j < columns / 8; ++j)
      for (int i = 0; i < 4; ++i) {
        int32_t sum = p.accumulate ? p.d[4 * j + i] : 0;
        const int8_t* row = &a[(16 * w + g + 8 * (i / 2)) * 32];
        const uint8_t* column = &b[(8 * j + 2 * q + i % 2) * 32];
        for (int k = 0; k < 32; ++k) sum += static_cast<int32_t>(row[k]) * column[k];
        p.d[4 * j + i] = sum;
      }
  }
}

inline void multiply_groups(const std::vector<void*>& threads, size_t pending) {
  auto& first = static_cast<Thread*>(threads[0])->products;
  const size_t closed = first.size() - 1, groups = closed > pending ? closed - pending : 0;
  for (void* t : threads)
    require(static_cast<Thread*>(t)->products.size() == first.size(), "threads of a warpgroup disagree about groups");
  for (size_t group = 0; group < groups; ++group)
    for (size_t i = 0; i < first[group].size(); ++i) multiply_group(threads, group, i);
  for (void* t : threads) {
    auto& mine = static_cast<Thread*>(t)->products;
    mine.erase(mine.begin(), mine.begin() + static_cast<long>(groups));
  }
}

}  // namespace emulator

namespace resq::cuda {

struct TensorMap {  // what cuTensorMapEncodeTiled is told
  const uint8_t* base;
  int64_t columns, rows, pitch;
  int box_columns, box_rows;
};

inline int thread_index() { return emulator::cta->current; }
inline int block_x() { return emulator::cta->block_x; }
inline int block_y() { return emulator::cta->block_y; }
inline int grid_x() { return emulator::cta->grid_x; }
inline uint32_t shared_base() { return 0; }

inline void barrier() {
  emulator::meet(emulator::cta->all, emulator::cta->current, static_cast<int>(emulator::cta->threads.size()), "barrier",
                 nullptr, [](const auto&) {});
}
inline void warp_barrier() {
  emulator::meet_warp("warp_barrier", nullptr, [](const auto&) {});
}
inline void device_fence() {}
inline uint32_t fetch_increment(uint32_t* counter) {
  emulator::check_global(counter, 4);
  return (*counter)++;
}

template <class T>
T load(const T* p) {
  emulator::check_global(p, sizeof(T));
  return *p;
}
template <class T>
T load_written(const T* p) {
  return load(p);
}
template <class T>
void store(T* p, T v) {
  emulator::check_global(p, sizeof(T));
  *p = v;
}
inline int4 load_fresh(const int4* p) { return load(p); }
inline void store_far(int4* p, int4 v) { store(p, v); }

inline uint4 shared_load(uint32_t at) {
  uint4 v;
  std::memcpy(&v, emulator::shared_at(at, 16), 16);
  return v;
}
inline void shared_store(uint32_t at, int4 v) { std::memcpy(emulator::shared_at(at, 16), &v, 16); }

inline void copy_async(uint32_t to, const void* from, int bytes) {
  emulator::require(bytes == 0 || bytes == 16, "copy_async of neither 0 nor 16 bytes");
  emulator::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "copy_async from a misaligned address");
  const emulator::Copy copy{to, from, bytes};
  if (emulator::cta->random() % 2) return emulator::perform(copy);  // some copies land at once, others as late as they may
  emulator::self().copies.back().push_back(copy);
}
inline void copy_async_commit() { emulator::self().copies.emplace_back(); }
template <int kPending>
void copy_async_wait() {
  auto& groups = emulator::self().copies;
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
    groups.erase(groups.begin());
  }
}

// Matrix i's row r comes from the address of lane 8i + r; lane l gets 4 bytes of row l / 4 at 4 (l % 4).
inline uint4 load_matrices(uint32_t at) {
  struct Operand {
    uint32_t at;
    uint32_t v[4];
  } mine{at, {}};
  emulator::meet_warp("ldmatrix", &mine, [](const std::vector<void*>& lanes) {
    for (int i = 0; i < 4; ++i) {
      uint32_t rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = static_cast<Operand*>(lanes[8 * i + r])->at;
      emulator::count_conflicts(rows);
      for (int l = 0; l < 32; ++l)
        std::memcpy(&static_cast<Operand*>(lanes[l])->v[i], emulator::shared_at(rows[l / 4], 16) + 4 * (l % 4), 4);
    }
  });
  return {mine.v[0], mine.v[1], mine.v[2], mine.v[3]};
}

inline void mma_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Fragments mine{d, a, {b0, b1}};
  emulator::meet_warp("mma", &mine, emulator::multiply_fragments);
}

inline void mma_s4u4(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Fragments mine{d, a, {b0, b1}};
  emulator::meet_warp("mma s4", &mine, emulator::multiply_nibble_fragments);
}

inline void wait_for_previous_kernel() {}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float to_float(int32_t v) { return static_cast<float>(v); }
inline float float_of_bits(int32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t bits_of_float(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline uint32_t half_bits(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t b;
  std::memcpy(&b, &h, 2);
  return b;
}
inline uint32_t bfloat_bits(float v) {  // round to nearest even; no NaN comes here
  const uint32_t b = bits_of_float(v);
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline float half_value(uint16_t v) {
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
inline float bfloat_value(uint16_t v) { return float_of_bits(static_cast<int32_t>(static_cast<uint32_t>(v) << 16)); }

// --- Hopper -----------------------------------------------------------------------------------------------------------
inline void mbarrier_init(uint32_t at, uint32_t arrivals) {
  emulator::require(at % 8 == 0, "misaligned mbarrier");
  emulator::cta->mbarriers[at] = {0, arrivals, arrivals, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t at) {
  emulator::Mbarrier& b = emulator::mbarrier(at);
  emulator::require(b.pending > 0, "an mbarrier got more arrivals than it counts");
  --b.pending;
  emulator::complete(b);
}
inline void mbarrier_expect(uint32_t at, uint32_t bytes) {
  emulator::mbarrier(at).bytes += bytes;
  mbarrier_arrive(at);
}
// Done when the phase of this parity has completed, as for a fresh barrier and parity 1.
inline void mbarrier_wait(uint32_t at, uint32_t parity) {
  emulator::Mbarrier& b = emulator::mbarrier(at);
  while ((b.phase & 1) == parity) emulator::suspend(&b.phase);
}
inline void deliver(uint32_t mbarrier, int64_t bytes) {
  emulator::Mbarrier& b = emulator::mbarrier(mbarrier);
  b.bytes -= bytes;
  emulator::complete(b);
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  emulator::require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "misaligned bulk copy");
  emulator::cta->engine.push_back({[=] {
    for (uint32_t i = 0; i < bytes; i += 16) {
      const uint8_t* p = static_cast<const uint8_t*>(from) + i;
      emulator::check_global(p, 16);
      std::memcpy(emulator::shared_at(to + i, 16), p, 16);
    }
    deliver(mbarrier, bytes);
  }});
}
inline void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t mbarrier) {
  emulator::require(to % 1024 == 0, "a swizzled box must start at a multiple of 1024 bytes");
  emulator::require(map->box_columns == 128 && map->box_rows <= 256, "a box that the swizzle or the engine cannot do");
  emulator::cta->engine.push_back({[=] {
    for (int r = 0; r < map->box_rows; ++r)
      for (int c = 0; c < map->box_columns; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        const uint8_t* p = map->base + (row + r) * map->pitch + column + c;
        if (inside) emulator::check_global(p, 1);
        const uint32_t at = to + r * 128 + c;
        *emulator::shared_at(at ^ (((at >> 7) & 7) << 4), 1) = inside ? *p : 0;
      }
    deliver(mbarrier, static_cast<int64_t>(map->box_rows) * map->box_columns);
  }});
}
inline void prefetch_map(const TensorMap*) {}
template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::self().products.emplace_back(); }
template <int kPending>
void wgmma_wait() {
  emulator::meet_group("wgmma_wait", &emulator::self(),
                       [](const std::vector<void*>& threads) { emulator::multiply_groups(threads, kPending); });
}
template <size_t kSums>
void wgmma_s8u8(int32_t (&d)[kSums], const uint32_t (&a)[4], uint64_t descriptor, uint32_t accumulate) {
  emulator::self().products.back().push_back({d, a, descriptor, static_cast<int>(2 * kSums), accumulate != 0});
}

}  // namespace resq::cuda
