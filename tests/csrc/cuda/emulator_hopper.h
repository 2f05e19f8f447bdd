// The functions of csrc/cuda/hopper.h on the host: mbarriers, bulk and tensor copies, wgmma.
#pragma once

#include "emulator_products.h"

namespace resq::cuda {

struct TensorMap {  // what cuTensorMapEncodeTiled is told
  const uint8_t* base;
  int64_t columns, rows, pitch;
  int box_columns, box_rows;
};

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
  emulator::check_order(from);
  emulator::require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "misaligned bulk copy");
  emulator::cta->engine.push_back({[=] {
    for (uint32_t i = 0; i < bytes; i += 16) {
      const uint8_t* p = static_cast<const uint8_t*>(from) + i;
      emulator::check_global(p, 16, emulator::Access::read);
      std::memcpy(emulator::shared_at(to + i, 16), p, 16);
    }
    deliver(mbarrier, bytes);
  }});
}
inline void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t mbarrier) {
  emulator::require(to % 1024 == 0, "a swizzled box must start at a multiple of 1024 bytes");
  emulator::check_order(map->base);
  emulator::require(map->box_columns == 128 && map->box_rows <= 256, "a box that the swizzle or the engine cannot do");
  emulator::cta->engine.push_back({[=] {
    for (int r = 0; r < map->box_rows; ++r)
      for (int c = 0; c < map->box_columns; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        const uint8_t* p = map->base + (row + r) * map->pitch + column + c;
        if (inside) emulator::check_global(p, 1, emulator::Access::read);
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
