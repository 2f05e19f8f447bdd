// GEMM by mma.sync for any number of tokens on every chip from sm_80: a CTA's warps share a tile of weights and codes.
//
// kStages stages of kBlocks blocks each in shared memory, filled by cp.async; weights reach the registers as in the decode
// kernel. Accumulators of the current run and float sums of the runs before it are both in registers. With splits > 1
// (few tokens, few channels) int32 sums of every (split, run) go through device memory instead, in the layout of the
// accumulators: a thread of the CTA that finishes the tile reads what its own twin wrote.
#pragma once

#include "mma_tile.h"

namespace resq::cuda {

template <int kTiles_, int kTokens8_, int kWarpsN_, int kWarpsM_, int kStages_, bool kSplit_,
          bool kInt4_ = false>
struct TiledShape {
  static constexpr int kTiles = kTiles_, kTokens8 = kTokens8_;  // of a warp
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kStages = kStages_, kBlocks = 2;
  static constexpr bool kSplit = kSplit_;
  static constexpr bool kInt4 = kInt4_;  // for 4-bit codes of the low part, on chips that have the instruction
  // CTAs a processor that the registers must leave room for; with none said, ptxas spills to reach 128 registers.
  static constexpr int kCtas = kWarpsM_ > 1 ? 1 : kTokens8_ <= 4 || kSplit_ ? 3 : 2;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kChannelTiles = kTiles * kWarpsN, kChannels = kTileChannels * kChannelTiles;
  static constexpr int kTokens = 8 * kTokens8 * kWarpsM;
  static constexpr int kBlockShared = kChannelTiles * kBlockBytes + kTokens * 64;
  static constexpr int kStageBytes = kBlocks * kBlockShared;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(!(kSplit && kInt4));
  static_assert(kChannelTiles * 32 % kThreads == 0 && kTokens * 4 % kThreads == 0);
};

template <class S>
RESQ_DEVICE void fetch_weight_stage(const GemmArgs& a, int channel_tile, int block, int end, uint32_t stage) {
  const int64_t last = weight_tiles(a.n) - 1;
#pragma unroll
  for (int k = 0; k < S::kBlocks; ++k) {
    if (block + k >= end) return;
#pragma unroll
    for (int i = 0; i < S::kChannelTiles * 32 / S::kThreads; ++i) {
      const int chunk = i * S::kThreads + thread_index();
      const int64_t t = static_cast<int64_t>(channel_tile) * S::kChannelTiles + chunk / 32;
      copy_async(stage + k * S::kBlockShared + chunk * 16,
                 a.weight + ((t < last ? t : last) * a.blocks + block + k) * kBlockBytes + chunk % 32 * 16, 16);
    }
  }
}

template <class S>
RESQ_DEVICE void fetch_code_stage(const GemmArgs& a, CodeCursor& cursor, int token_tile, int block, int end,
                                  uint32_t stage) {
#pragma unroll
  for (int k = 0; k < S::kBlocks; ++k) {
    if (block + k >= end) return;
    cursor.move_to(a, block + k);
#pragma unroll
    for (int i = 0; i < S::kTokens * 4 / S::kThreads; ++i) {
      const int chunk = i * S::kThreads + thread_index(), row = chunk / 4;
      copy_codes(a, cursor, block + k, stage + k * S::kBlockShared + S::kChannelTiles * kBlockBytes, row,
                 token_tile * S::kTokens + row, chunk % 4);
    }
  }
}

// The warp's place in the output, and what it does where a run ends.
template <class S>
struct TiledWarp {
  const GemmArgs& a;
  int channel, token;  // of the lane's first quad
  int4* partial;       // of the thread

  RESQ_DEVICE void end_run([[maybe_unused]] GemmRun run, int r, int split, int32_t (&acc)[S::kTiles][S::kTokens8][4],
                           float (&y)[S::kTiles][S::kTokens8][4]) const {
    if constexpr (S::kInt4) run.nibbles = 0;  // the sums are those of w, not of 16·w
    ChannelFactors w[S::kTiles] = {};
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c)
      if constexpr (!S::kSplit) w[c] = channel_factors(a, run, r, channel + c * kTileChannels);
#pragma unroll
    for (int t = 0; t < S::kTokens8; ++t) {
      TokenFactors x{};
      if constexpr (!S::kSplit) x = token_factors(a, run.group, token + 8 * t);
#pragma unroll
      for (int c = 0; c < S::kTiles; ++c) {
        if constexpr (S::kSplit) {
          store_far(partial + slot(split + r, c, t), {acc[c][t][0], acc[c][t][1], acc[c][t][2], acc[c][t][3]});
        } else {
          add_run(a, run, r, x, w[c], acc[c][t], y[c][t]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][t][i] = 0;
      }
    }
  }
  RESQ_DEVICE int64_t slot(int index, int c, int t) const {
    return ((static_cast<int64_t>(index) * S::kTiles + c) * S::kTokens8 + t) * S::kThreads;
  }
  // Sums of the splits, run after run, of 16 channels after 16: as many loads are under way as for the whole tile, in
  // half the registers, which leaves some for CTAs of the next kernel.
  RESQ_DEVICE void finish() const {
#pragma unroll 1
    for (int c = 0; c < S::kTiles; ++c) {
      float y[S::kTokens8][4] = {};
#pragma unroll 1
      for (int r = 0; r < a.n_runs; ++r) {
        const GemmRun run = load_run(a.runs, r);
        int32_t sums[S::kTokens8][4];
        sum_splits<16>(a, run, r, partial + slot(0, c, 0), slot(1, 0, 0), S::kThreads, sums);
        const ChannelFactors w = channel_factors(a, run, r, channel + c * kTileChannels);
#pragma unroll
        for (int t = 0; t < S::kTokens8; ++t)
          add_run(a, run, r, token_factors(a, run.group, token + 8 * t), w, sums[t], y[t]);
      }
      store_row(c, y);
    }
  }
  // y of tile `c` of 16 channels.
  RESQ_DEVICE void store_row(int c, const float (&y)[S::kTokens8][4]) const {
    const Bias bias = load_bias(a, channel + c * kTileChannels);
#pragma unroll
    for (int t = 0; t < S::kTokens8; ++t) store_quad(a, token + 8 * t, channel + c * kTileChannels, bias, y[t]);
  }
};

template <class S>
RESQ_DEVICE void tiled_gemm(const GemmArgs& a) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31, split = S::kSplit ? block_y() : 0;
  const int wn = warp % S::kWarpsN, wm = warp / S::kWarpsN;
  const int channel_tiles = (a.n + S::kChannels - 1) / S::kChannels, token_tiles = (a.m + S::kTokens - 1) / S::kTokens;
  const TilePlace tile = tile_place(block_x(), channel_tiles, token_tiles);
  const BlockRange range = S::kSplit ? split_range(a.blocks, a.splits, split) : BlockRange{0, a.blocks};
  const uint32_t shared = shared_base();

#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i)
    fetch_weight_stage<S>(a, tile.channel, range.begin + i * S::kBlocks, range.end, shared + i * S::kStageBytes);
  wait_for_previous_kernel();
  launch_dependents();
  CodeCursor fetched(a);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    fetch_code_stage<S>(a, fetched, tile.token, range.begin + i * S::kBlocks, range.end, shared + i * S::kStageBytes);
    copy_async_commit();
  }

  TiledWarp<S> self{a, tile.channel * S::kChannels + wn * S::kTiles * kTileChannels + 2 * (lane >> 2),
                    tile.token * S::kTokens + wm * S::kTokens8 * 8 + 2 * (lane & 3), nullptr};
  const int64_t tile_quads = static_cast<int64_t>(partial_slots(a.splits, a.n_runs)) * S::kTiles * S::kTokens8;
  if constexpr (S::kSplit)
    self.partial = reinterpret_cast<int4*>(a.partial) + block_x() * tile_quads * S::kThreads + thread_index();
  int32_t acc[S::kTiles][S::kTokens8][4] = {};
  float y[S::kTiles][S::kTokens8][4] = {};
  CodeCursor runs(a);
  runs.move_to(a, range.begin);
  int stage = 0;
  for (int block = range.begin; block < range.end; block += S::kBlocks) {
    copy_async_wait<S::kStages - 2>();
    barrier();  // every thread's copies have landed, and every warp is done with the stage that is filled next
    const int next = block + (S::kStages - 1) * S::kBlocks;
    const uint32_t next_stage = shared + (stage == 0 ? S::kStages - 1 : stage - 1) * S::kStageBytes;
    fetch_weight_stage<S>(a, tile.channel, next, range.end, next_stage);
    fetch_code_stage<S>(a, fetched, tile.token, next, range.end, next_stage);
    copy_async_commit();
#pragma unroll 1
    for (int k = 0; k < S::kBlocks; ++k) {
      if (block + k >= range.end) break;
      const uint32_t at = shared + stage * S::kStageBytes + k * S::kBlockShared;
      multiply_block<S::kInt4>(at + wn * S::kTiles * kBlockBytes,
                     at + S::kChannelTiles * kBlockBytes + wm * S::kTokens8 * 512, runs.run.nibbles != 0, lane, acc);
      const bool run_ends = block + k + 1 == runs.run.first_block + runs.run.blocks;
      if (run_ends || block + k + 1 == range.end) {
        self.end_run(runs.run, runs.r, split, acc, y);
        if (run_ends && runs.r + 1 < a.n_runs) runs.run = load_run(a.runs, ++runs.r);
      }
    }
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }

  if constexpr (S::kSplit) {
    // The stages are read no more: arrived_last's barrier comes before its flag is written there.
    if (!arrived_last(a, block_x(), shared)) return;
    self.finish();
  } else {
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c) self.store_row(c, y[c]);
  }
}

}  // namespace resq::cuda
