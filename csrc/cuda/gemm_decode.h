// GEMM for few tokens: bound by the bytes of the weights, so that every warp does nothing but keep loads in flight.
//
// A CTA computes 16·kTiles channels of all tokens (at most 8·kTokens8). Its 8 warps deal the blocks of its share of the
// columns among themselves, each with a ring of kDepth slots of its own in shared memory, filled by cp.async and never
// waited for by another warp. Where a run ends the warps add up their int32 sums; integer sums have no order, so the
// result does not depend on how the columns were dealt.
#pragma once

#include "mma_tile.h"

namespace resq::cuda {

template <int kTiles_, int kTokens8_, int kDepth_>
struct DecodeShape {
  static constexpr int kTiles = kTiles_, kTokens8 = kTokens8_, kDepth = kDepth_;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kHalf = kWarps / 2;
  static constexpr int kChannels = kTileChannels * kTiles, kTokens = 8 * kTokens8;
  static constexpr int kSlotBytes = kTiles * kBlockBytes + kTokens8 * 512;
  static constexpr int kRingBytes = kWarps * kDepth * kSlotBytes;
  static constexpr int kQuads = kTiles * kTokens8 * 32;  // of four sums; thread i finishes quad i
  static constexpr int kSharedBytes = kRingBytes + kHalf * kQuads * 16;
  static constexpr int kCtas = 2;  // a processor, that the registers must leave room for
  static_assert(kQuads <= kThreads);
};

template <class S>
struct DecodeWarp {
  const GemmArgs& a;
  CodeCursor cursor;
  const uint8_t* weight[S::kTiles];
  uint32_t ring;
  int lane;

  RESQ_DEVICE DecodeWarp(const GemmArgs& args, int tile, int warp, int lane_)
      : a(args), cursor(args), ring(shared_base() + warp * S::kDepth * S::kSlotBytes), lane(lane_) {
    const int64_t last = weight_tiles(a.n) - 1;
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c) {
      const int64_t t = static_cast<int64_t>(tile) * S::kTiles + c;
      weight[c] = a.weight + (t < last ? t : last) * a.blocks * kBlockBytes + lane * 16;
    }
  }
  RESQ_DEVICE void fetch_weights(int block, int slot) const {
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c)
      copy_async(ring + slot * S::kSlotBytes + c * kBlockBytes + lane * 16,
                 weight[c] + static_cast<int64_t>(block) * kBlockBytes, 16);
  }
  RESQ_DEVICE void fetch_codes(int block, int slot) {
    cursor.move_to(a, block);
#pragma unroll
    for (int t = 0; t < S::kTokens8; ++t)
      copy_codes(a, cursor, block, ring + slot * S::kSlotBytes + S::kTiles * kBlockBytes + t * 512, lane >> 2,
                 8 * t + (lane >> 2), lane & 3);
  }
};

// Sums of the warps: those of the second half write their accumulators, those of the first add their own, then thread i
// adds up quad i. Half the shared memory of writing them all: what is left holds loads in flight.
template <class S>
RESQ_DEVICE void sum_warps(const int32_t (&acc)[S::kTiles][S::kTokens8][4], uint32_t area, int warp, int lane,
                           int32_t (&sums)[4]) {
  const uint32_t mine = area + warp % S::kHalf * S::kQuads * 16 + lane * 16;
  barrier();  // the sums of the run before have been read
#pragma unroll
  for (int half = 1; half >= 0; --half) {
    if (warp / S::kHalf == half) {
#pragma unroll
      for (int i = 0; i < S::kTiles * S::kTokens8; ++i) {
        const int32_t(&v)[4] = acc[i / S::kTokens8][i % S::kTokens8];
        uint4 before = {0, 0, 0, 0};
        if (half == 0) before = shared_load(mine + i * 512);
        shared_store(mine + i * 512, {v[0] + static_cast<int32_t>(before.x), v[1] + static_cast<int32_t>(before.y),
                                      v[2] + static_cast<int32_t>(before.z), v[3] + static_cast<int32_t>(before.w)});
      }
    }
    barrier();
  }
  sums[0] = sums[1] = sums[2] = sums[3] = 0;
  if (thread_index() >= S::kQuads) return;
#pragma unroll
  for (int w = 0; w < S::kHalf; ++w) {
    const uint4 v = shared_load(area + w * S::kQuads * 16 + thread_index() * 16);
    sums[0] += static_cast<int32_t>(v.x), sums[1] += static_cast<int32_t>(v.y);
    sums[2] += static_cast<int32_t>(v.z), sums[3] += static_cast<int32_t>(v.w);
  }
}

template <class S>
RESQ_DEVICE void decode_gemm(const GemmArgs& a) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31, tile = block_x(), split = block_y();
  const BlockRange range = split_range(a.blocks, a.splits, split);
  const uint32_t area = shared_base() + S::kRingBytes;
  DecodeWarp<S> self(a, tile, warp, lane);

  // Weights do not depend on the kernel before: they are under way while it ends.
  int block = range.begin + warp;
#pragma unroll
  for (int i = 0; i < S::kDepth - 1; ++i)
    if (block + i * S::kWarps < range.end) self.fetch_weights(block + i * S::kWarps, i);
  wait_for_previous_kernel();
  launch_dependents();
#pragma unroll
  for (int i = 0; i < S::kDepth - 1; ++i) {
    if (block + i * S::kWarps < range.end) self.fetch_codes(block + i * S::kWarps, i);
    copy_async_commit();
  }

  // Thread i finishes quad i: tile of 16 channels, tile of 8 tokens, lane.
  const int quad = thread_index();
  const bool owner = quad < S::kQuads;
  const int channel = tile * S::kChannels + (quad >> 5) / S::kTokens8 * kTileChannels + 2 * (lane >> 2);
  const int token = (quad >> 5) % S::kTokens8 * 8 + 2 * (lane & 3);
  const int slots = partial_slots(a.splits, a.n_runs);
  int4* partial = reinterpret_cast<int4*>(a.partial) + static_cast<int64_t>(tile) * slots * S::kQuads + quad;
  float y[4] = {0.f, 0.f, 0.f, 0.f};
  int slot = 0;

  CodeCursor runs(a);
  runs.move_to(a, range.begin);
  while (true) {
    const int run_end = runs.run.first_block + runs.run.blocks, end = run_end < range.end ? run_end : range.end;
    const bool nibbles = runs.run.nibbles != 0;
    int32_t acc[S::kTiles][S::kTokens8][4] = {};
    for (; block < end; block += S::kWarps) {
      copy_async_wait<S::kDepth - 2>();
      warp_barrier();  // every lane's copies have landed, and every lane is done with the slot that is filled next
      const int next = block + (S::kDepth - 1) * S::kWarps, next_slot = slot == 0 ? S::kDepth - 1 : slot - 1;
      if (next < range.end) {
        self.fetch_weights(next, next_slot);
        self.fetch_codes(next, next_slot);
      }
      copy_async_commit();
      const uint32_t at = self.ring + slot * S::kSlotBytes;
      multiply_block<false>(at, at + S::kTiles * kBlockBytes, nibbles, lane, acc);
      slot = slot + 1 == S::kDepth ? 0 : slot + 1;
    }
    int32_t sums[4];
    sum_warps<S>(acc, area, warp, lane, sums);
    if (owner && a.splits == 1) finish_run(a, runs.run, runs.r, token, channel, sums, y);
    if (owner && a.splits > 1)
      store_far(partial + static_cast<int64_t>(split + runs.r) * S::kQuads, {sums[0], sums[1], sums[2], sums[3]});
    if (end == range.end) break;
    runs.run = load_run(a.runs, ++runs.r);
  }

  if (a.splits > 1) {
    if (!arrived_last(a, tile, area)) return;
    for (int r = 0; owner && r < a.n_runs; ++r) {
      const GemmRun run = load_run(a.runs, r);
      const TokenFactors x = token_factors(a, run.group, token);
      const ChannelFactors w = channel_factors(a, run, r, channel);
      int32_t sums[1][4];
      sum_splits<8>(a, run, r, partial, S::kQuads, 0, sums);
      add_run(a, run, r, x, w, sums[0], y);
    }
  }
  if (owner) store_quad(a, token, channel, load_bias(a, channel), y);
}

}  // namespace resq::cuda
