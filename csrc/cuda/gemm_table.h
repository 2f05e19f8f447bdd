// Which kernel computes which shape on which chip. Host code; the numbers of a kernel are checked where it is compiled.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "schedule.h"
#include "weights.h"

namespace resq::cuda {

enum class Family : int32_t { decode, tiled, int4, wgmma };

struct KernelInfo {
  const char* name;
  Family family;
  int tokens, channels;  // of a CTA's tile
  int quads;             // int4 of partial sums of a (tile, split, run)
  bool whole, split;     // runs with one CTA a tile; with several
  int ctas;              // resident on a processor that their launch bounds leave registers for, on every chip
  int shared;            // bytes of a CTA
};

// Names end in the tile: m = tokens, n = channels. Order: that of KernelId.
constexpr KernelInfo kKernels[] = {
    {"decode_m8_n32", Family::decode, 8, 32, 64, true, true, 2, 53248},
    {"decode_m8_n64", Family::decode, 8, 64, 128, true, true, 2, 90112},
    {"decode_m16_n32", Family::decode, 16, 32, 128, true, true, 2, 73728},
    {"decode_m16_n64", Family::decode, 16, 64, 256, true, true, 2, 90112},
    {"tiled_m32_n128", Family::tiled, 32, 128, 1024, true, false, 3, 49152},
    {"tiled_m32_n128_split", Family::tiled, 32, 128, 1024, false, true, 3, 49152},
    {"tiled_m64_n128_split", Family::tiled, 64, 128, 2048, false, true, 3, 65536},
    {"tiled_m128_n128_split", Family::tiled, 128, 128, 4096, false, true, 1, 73728},
    {"tiled_m64_n128", Family::tiled, 64, 128, 2048, true, false, 2, 65536},
    {"tiled_m128_n128", Family::tiled, 128, 128, 4096, true, false, 1, 73728},
    {"tiled_m64_n128_s4", Family::int4, 64, 128, 2048, true, false, 2, 65536},
    {"tiled_m128_n128_s4", Family::int4, 128, 128, 4096, true, false, 1, 73728},
    {"wgmma_m64_n128", Family::wgmma, 64, 128, 0, true, false, 1, 173168},
    {"wgmma_m128_n128", Family::wgmma, 128, 128, 0, true, false, 1, 197728},
};

enum KernelId : int32_t {
  decode_m8_n32,
  decode_m8_n64,
  decode_m16_n32,
  decode_m16_n64,
  tiled_m32_n128,
  tiled_m32_n128_split,
  tiled_m64_n128_split,
  tiled_m128_n128_split,
  tiled_m64_n128,
  tiled_m128_n128,
  tiled_m64_n128_s4,
  tiled_m128_n128_s4,
  wgmma_m64_n128,
  wgmma_m128_n128,
  kKernelCount
};
static_assert(sizeof(kKernels) / sizeof(kKernels[0]) == kKernelCount);

struct Chip {
  int arch;        // 10·major + minor
  int processors;
  int shared;      // bytes of a processor
  bool wgmma;      // a Hopper chip, and its own code was built
  bool int4;       // sm_80, sm_86 or sm_89, and code for one of them was built
};

struct Choice {
  int32_t kernel;
  int32_t splits;
};

// Workspace for partial sums, allocated once a device; shapes that need more are split less.
constexpr int64_t kPartialBytes = int64_t{32} << 20;
constexpr int kMaxTiles = 1 << 14;  // of a split launch: counters of arrivals
constexpr int kMaxSplits = 8;
constexpr int kBlocksOfSplit = 16;  // at least, so that each of 8 warps has two

constexpr int kReservedShared = 1 << 10;  // bytes of every CTA's shared memory that the system takes

// CTAs of the kernel that a processor of the chip holds at once.
inline int resident(const KernelInfo& k, const Chip& chip) {
  return std::max(1, std::min(k.ctas, chip.shared / (k.shared + kReservedShared)));
}

// Places for CTAs on a processor, which share its part of memory's bandwidth. Two have 48 KB or more of loads in flight,
// on Hopper 4.8 TB/s for 1.3 us: more of them would read no faster.
inline int places(const KernelInfo& k, const Chip& chip) { return std::min(resident(k, chip), 2); }

// What a processor could have read while a CTA starts and ends: some 0.7 us of 4.8 TB/s on Hopper, of 2 TB/s before.
inline double start_bytes(const Chip& chip) { return chip.arch >= 90 ? 24 << 10 : 12 << 10; }

inline int64_t tiles_of(const KernelInfo& k, int64_t m, int64_t n) {
  return (m + k.tokens - 1) / k.tokens * ((n + k.channels - 1) / k.channels);
}

inline int64_t partial_bytes(const KernelInfo& k, int64_t m, int64_t n, int32_t splits, int32_t runs) {
  return tiles_of(k, m, n) * partial_slots(splits, runs) * k.quads * 16;
}

// CTAs a tile. What is least is the time of a place for a CTA, in bytes of device memory read at its share of the
// bandwidth:
//   - waves of CTAs, each its weights and what starting costs. Where one wave leaves places empty the others read faster,
//     by a half at most: 24 KB in flight every 0.9 us are 27 GB/s, a place's share of 4.8 TB/s 18;
//   - partial sums, written to L2 at twice the speed of memory, all places together;
//   - the partial sums of a tile, which the CTA that finishes it reads alone: 32 KB in flight every 900 clocks, thrice a
//     place's share.
inline int32_t choose_splits(const KernelInfo& k, const Chip& chip, int64_t m, int64_t n, int32_t blocks, int32_t runs) {
  if (!k.split) return 1;
  const int64_t tiles = tiles_of(k, m, n), all = int64_t{chip.processors} * places(k, chip);
  // A CTA on every processor keeps memory busy; with more than 16 tokens the sums are as large as the weights.
  if (k.tokens > 16 && tiles >= chip.processors) return 1;
  int32_t best = 1;
  double least = 1e30;
  for (int32_t s = 1; s <= kMaxSplits; ++s) {
    const int64_t partial = s > 1 ? partial_bytes(k, m, n, s, runs) : 0, ctas = tiles * s;
    if (s > 1 && (blocks / s < kBlocksOfSplit || tiles > kMaxTiles || partial > kPartialBytes)) break;
    const double waves = static_cast<double>((ctas + all - 1) / all);
    const double faster = std::clamp(static_cast<double>(all) / static_cast<double>(ctas), 1.0, 1.5);
    const double weights = static_cast<double>(k.channels / kTileChannels) * blocks * kBlockBytes / s / faster;
    const double written = static_cast<double>(partial) / static_cast<double>(2 * all);
    const double finished = static_cast<double>(partial) / static_cast<double>(3 * tiles);
    const double time = waves * (weights + start_bytes(chip) / places(k, chip)) + written + finished;
    if (time < least) least = time, best = s;
  }
  return best;
}

// A tiled kernel of `tokens` tokens: split where that fills the chip better, and possible.
inline Choice choose_tiled(int whole, int split, const Chip& chip, int64_t m, int64_t n, int32_t blocks, int32_t runs) {
  const int32_t splits = choose_splits(kKernels[split], chip, m, n, blocks, runs);
  return splits > 1 ? Choice{split, splits} : Choice{whole, 1};
}

// The table. four_bits: all codes of the low part are 0..15. Nothing in it was measured yet: it follows from bytes and
// waves of CTAs.
inline Choice choose_kernel(const Chip& chip, int64_t m, int64_t n, int32_t blocks, int32_t runs, bool four_bits) {
  if (m <= 16) {
    const int narrow = m <= 8 ? decode_m8_n32 : decode_m16_n32, wide = narrow + 1;
    // Wide tiles read the codes half as often; narrow ones fill the chip.
    const int kernel = tiles_of(kKernels[wide], m, n) >= 2 * chip.processors ? wide : narrow;
    return {kernel, choose_splits(kKernels[kernel], chip, m, n, blocks, runs)};
  }
  if (m <= 32) return choose_tiled(tiled_m32_n128, tiled_m32_n128_split, chip, m, n, blocks, runs);
  const bool fills = 4 * tiles_of(kKernels[wgmma_m64_n128], m, n) >= 3 * chip.processors;
  // A column of 128 channels is 8192 products for 64 tokens: 4 clocks of mma.sync (at best half of Hopper's rate), 2 of
  // wgmma. Its 64 bytes of 4-bit weights come in 3 clocks: at 4.8 TB/s a processor gets 21 bytes a clock.
  if (m <= 64 && chip.wgmma && fills) return {wgmma_m64_n128, 1};
  if (m <= 64) return choose_tiled(tiled_m64_n128, tiled_m64_n128_split, chip, m, n, blocks, runs);
  const int64_t tiles = tiles_of(kKernels[wgmma_m128_n128], m, n);
  if (chip.wgmma) {
    if (4 * tiles >= 3 * chip.processors) return {wgmma_m128_n128, 1};
    if (fills) return {wgmma_m64_n128, 1};
    return choose_tiled(tiled_m64_n128, tiled_m64_n128_split, chip, m, n, blocks, runs);
  }
  const bool int4 = chip.int4 && four_bits;
  if (2 * tiles >= chip.processors)
    return choose_tiled(int4 ? tiled_m128_n128_s4 : tiled_m128_n128, tiled_m128_n128_split, chip, m, n, blocks, runs);
  return choose_tiled(int4 ? tiled_m64_n128_s4 : tiled_m64_n128, tiled_m64_n128_split, chip, m, n, blocks, runs);
}

// "tiled_m64_n128_split x4".
inline std::string kernel_name(const Choice& choice) {
  return std::string(kKernels[choice.kernel].name) + (choice.splits > 1 ? " x" + std::to_string(choice.splits) : "");
}

}  // namespace resq::cuda
