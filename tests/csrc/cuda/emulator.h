// The functions of csrc/cuda/device.h and hopper.h on the host.
//
// Written from the PTX ISA, not from the kernels. What hardware does late is done late here too: cp.async copies at once
// or at the wait that covers them, bulk and tensor copies at a random later moment, wgmma at its wait, reading shared
// memory and A registers then.
#pragma once

#include "emulator_cta.h"
#include "emulator_hopper.h"
#include "emulator_products.h"

namespace resq::cuda {

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
  emulator::check_global(counter, 4, emulator::Access::write);
  emulator::check_order(counter);
  return (*counter)++;
}

// The read-only path: not for what a kernel writes.
template <class T>
T load(const T* p) {
  emulator::check_global(p, sizeof(T), emulator::Access::constant);
  return *p;
}
template <class T>
T load_written(const T* p) {
  emulator::check_global(p, sizeof(T), emulator::Access::read);
  emulator::check_order(p);
  return *p;
}
template <class T>
void store(T* p, T v) {
  emulator::check_global(p, sizeof(T), emulator::Access::write);
  emulator::check_order(p);
  *p = v;
}
inline int4 load_fresh(const int4* p) { return load_written(p); }
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
  if (bytes) emulator::check_order(from);
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

inline void wait_for_previous_kernel() { emulator::self().waited = true; }
inline void launch_dependents() {
  emulator::require(emulator::self().waited, "launch_dependents before wait_for_previous_kernel");
}

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

}  // namespace resq::cuda
