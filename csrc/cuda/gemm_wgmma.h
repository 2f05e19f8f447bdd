// GEMM for many tokens on Hopper: yᵀ = W · xᵀ by wgmma, with the weights as the operand in registers.
//
// A CTA computes 128 channels of kTokens tokens, tile after tile: one thread of the first warpgroup keeps the copy engine
// busy, two warpgroups of 64 channels each unpack weights and multiply. Codes lie in shared memory as wgmma wants them
// (rows of 128 bytes, 128-byte swizzle, which the copy does); weights as they are in device memory: a warp's 16 rows of A
// are one tile of weights.h.
//
// Registers: the int32 sums of the current run and the float sums of the runs before it, kTokens/2 each, are both live.
// At 128 x 256 they would need 256, so that kTokens is 128 or 192 and float sums never leave the registers. B is read from
// shared memory at the same rate at any kTokens (A has 64 rows), and unpacking is 12 operations a wgmma of >= 64 clocks.
#pragma once

#include "epilogue.h"
#include "hopper.h"
#include "schedule.h"

namespace resq::cuda {

template <int kTokens_, int kStages_>
struct WgmmaShape {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kChannels = 128, kChannelTiles = kChannels / kTileChannels;
  static constexpr int kThreads = 384, kSums = kTokens / 2;
  static constexpr int kColumnBytes = 128;                 // of a token in a stage: 128 columns
  static constexpr int kTileBytes = 4 * kBlockBytes;       // of a stage's weights, at 8 bits
  static constexpr int kWeightBytes = kChannelTiles * kTileBytes, kCodeBytes = kTokens * kColumnBytes;
  static constexpr int kStageBytes = kWeightBytes + kCodeBytes;
  static constexpr int kBarriers = kStages * kStageBytes;  // full, then empty, 8 bytes each
  static constexpr int kAlignment = 1024;                  // of the swizzle
  static constexpr int kSharedBytes = kBarriers + 16 * kStages + kAlignment;
  static constexpr int kConsumerWarps = 8, kCtas = 1;
  static_assert(kStageBytes % kAlignment == 0);
};

RESQ_DEVICE int blocks_a_stage(const GemmRun& run) { return run.nibbles ? 2 : 4; }

// Shared-memory operand B: K-major rows of 128 bytes, 128-byte swizzle, groups of 8 rows 1024 bytes apart.
RESQ_DEVICE uint64_t code_descriptor(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

// The ring of stages as one side walks it.
template <class S>
struct Ring {
  uint32_t base;
  int slot = 0;
  uint32_t parity = 0;

  RESQ_DEVICE explicit Ring(uint32_t at) : base(at) {}
  RESQ_DEVICE uint32_t weights() const { return base + slot * S::kStageBytes; }
  RESQ_DEVICE uint32_t codes() const { return weights() + S::kWeightBytes; }
  RESQ_DEVICE uint32_t full() const { return base + S::kBarriers + 8 * slot; }
  RESQ_DEVICE uint32_t empty(int of) const { return base + S::kBarriers + 8 * (S::kStages + of); }
  RESQ_DEVICE void advance() {
    if (++slot == S::kStages) slot = 0, parity ^= 1;
  }
};

template <class S>
RESQ_DEVICE void produce(const GemmArgs& a, const TensorMap* codes, Ring<S> ring, int tiles, int channel_tiles,
                         int token_tiles) {
  const int64_t last = weight_tiles(a.n) - 1;
  for (int index = block_x(); index < tiles; index += grid_x()) {
    const TilePlace tile = tile_place(index, channel_tiles, token_tiles);
    for (int r = 0; r < a.n_runs; ++r) {
      const GemmRun run = load_run(a.runs, r);
      const int step = blocks_a_stage(run);
      int column = a.part_at[run.part] + run.at;
      for (int block = 0; block < run.blocks; block += step, column += S::kColumnBytes) {
        const int blocks = run.blocks - block < step ? run.blocks - block : step;
        const uint32_t bytes = blocks * kBlockBytes;
        mbarrier_wait(ring.empty(ring.slot), ring.parity ^ 1);
        mbarrier_expect(ring.full(), S::kCodeBytes + S::kChannelTiles * bytes);
        copy_box(ring.codes(), codes, column, tile.token * S::kTokens, ring.full());
#pragma unroll 1
        for (int i = 0; i < S::kChannelTiles; ++i) {
          const int64_t t = static_cast<int64_t>(tile.channel) * S::kChannelTiles + i;
          copy_bulk(ring.weights() + i * S::kTileBytes,
                    a.weight + ((t < last ? t : last) * a.blocks + run.first_block + block) * kBlockBytes, bytes,
                    ring.full());
        }
        ring.advance();
      }
    }
  }
}

// A registers of 64 columns, half `half` of a stage; blocks at and beyond `valid` were not copied and count as 0.
RESQ_DEVICE void load_weights(uint32_t at, bool nibbles, int half, int valid, uint32_t (&a)[2][4]) {
  if (nibbles) {
    const uint4 w = shared_load(at + half * kBlockBytes);
    const uint32_t mask = half < valid ? 0xf0f0f0f0u : 0u;
    a[0][0] = low_nibbles(w.x, mask), a[0][1] = high_nibbles(w.x, mask);
    a[0][2] = low_nibbles(w.y, mask), a[0][3] = high_nibbles(w.y, mask);
    a[1][0] = low_nibbles(w.z, mask), a[1][1] = high_nibbles(w.z, mask);
    a[1][2] = low_nibbles(w.w, mask), a[1][3] = high_nibbles(w.w, mask);
    return;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint4 w = shared_load(at + (2 * half + k) * kBlockBytes);
    const uint32_t mask = 2 * half + k < valid ? 0xffffffffu : 0u;
    a[k][0] = w.x & mask, a[k][1] = w.y & mask, a[k][2] = w.z & mask, a[k][3] = w.w & mask;
  }
}

template <class S>
RESQ_DEVICE void consume(const GemmArgs& a, Ring<S> ring, int tiles, int channel_tiles, int token_tiles) {
  const int lane = thread_index() & 31, warp = (thread_index() >> 5) - 4;
  const uint32_t my_weights = warp * S::kTileBytes + lane * 16;
  for (int index = block_x(); index < tiles; index += grid_x()) {
    const TilePlace tile = tile_place(index, channel_tiles, token_tiles);
    const int channel = tile.channel * S::kChannels + warp * kTileChannels + 2 * (lane >> 2);
    const int token = tile.token * S::kTokens + 2 * (lane & 3);
    int32_t acc[S::kSums] = {};
    float y[S::kSums] = {};
    for (int r = 0; r < a.n_runs; ++r) {
      const GemmRun run = load_run(a.runs, r);
      const bool nibbles = run.nibbles != 0;
      const int step = blocks_a_stage(run);
      uint32_t weights[2][2][4];
      int before = -1;
      for (int block = 0; block < run.blocks; block += step) {
        mbarrier_wait(ring.full(), ring.parity);
        const uint64_t codes = code_descriptor(ring.codes());
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // The products of the other half are under way meanwhile.
          load_weights(ring.weights() + my_weights, nibbles, half, run.blocks - block, weights[half]);
          wgmma_fence();
          wgmma_s8u8(acc, weights[half][0], codes + 4 * half, block > 0 || half > 0);
          wgmma_s8u8(acc, weights[half][1], codes + 4 * half + 2, 1);
          wgmma_commit();
          wgmma_wait<1>();
          if (half == 0 && before >= 0) {
            warp_barrier();
            if (lane == 0) mbarrier_arrive(ring.empty(before));
          }
        }
        before = ring.slot;
        ring.advance();
      }
      wgmma_wait<0>();
      warp_barrier();
      if (lane == 0) mbarrier_arrive(ring.empty(before));
      const ChannelFactors w = channel_factors(a, run, r, channel);
#pragma unroll
      for (int t = 0; t < S::kTokens / 8; ++t) {
        const int32_t sums[4] = {acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]};
        float part[4] = {y[4 * t], y[4 * t + 1], y[4 * t + 2], y[4 * t + 3]};
        add_run(a, run, r, token_factors(a, run.group, token + 8 * t), w, sums, part);
        y[4 * t] = part[0], y[4 * t + 1] = part[1], y[4 * t + 2] = part[2], y[4 * t + 3] = part[3];
      }
    }
    const Bias bias = load_bias(a, channel);
#pragma unroll
    for (int t = 0; t < S::kTokens / 8; ++t) {
      const float part[4] = {y[4 * t], y[4 * t + 1], y[4 * t + 2], y[4 * t + 3]};
      store_quad(a, token + 8 * t, channel, bias, part);
    }
  }
}

template <class S>
RESQ_DEVICE void wgmma_gemm(const GemmArgs& a, const TensorMap* codes) {
  const uint32_t base = (shared_base() + S::kAlignment - 1) / S::kAlignment * S::kAlignment;
  Ring<S> ring(base);
  if (thread_index() == 0) {
    prefetch_map(codes);
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(base + S::kBarriers + 8 * i, 1);
      mbarrier_init(ring.empty(i), S::kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  barrier();
  wait_for_previous_kernel();
  launch_dependents();
  const int channel_tiles = (a.n + S::kChannels - 1) / S::kChannels, token_tiles = (a.m + S::kTokens - 1) / S::kTokens;
  const int tiles = channel_tiles * token_tiles;
  if (thread_index() < 128) {
    fewer_registers<24>();
    if (thread_index() == 0) produce<S>(a, codes, ring, tiles, channel_tiles, token_tiles);
  } else {
    more_registers<240>();
    consume<S>(a, ring, tiles, channel_tiles, token_tiles);
  }
}

}  // namespace resq::cuda
