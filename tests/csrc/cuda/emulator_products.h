// What the tensor cores compute, from the fragments and descriptors of the PTX ISA.
#pragma once

#include "emulator_cta.h"

namespace emulator {

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
