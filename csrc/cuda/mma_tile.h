// What both mma.sync kernels share: filling shared memory by cp.async, and one block of a warp's tile.
#pragma once

#include "device.h"
#include "epilogue.h"
#include "gemm.h"
#include "schedule.h"
#include "weights.h"

namespace resq::cuda {

// Where the codes of a block lie in a row; moves forward only.
struct CodeCursor {
  int r = 0;
  GemmRun run;

  RESQ_DEVICE explicit CodeCursor(const GemmArgs& a) : run(load_run(a.runs, 0)) {}
  RESQ_DEVICE void move_to(const GemmArgs& a, int block) {
    while (block >= run.first_block + run.blocks) run = load_run(a.runs, ++r);
  }
  RESQ_DEVICE int byte(const GemmArgs& a, int block) const {
    return a.part_at[run.part] + run.at + (block - run.first_block) * block_columns(run.nibbles != 0);
  }
};

// Chunk `chunk` (16 bytes) of a block's codes of token `row`, to its place in a tile of 64-byte rows. Tokens beyond m and
// bytes beyond a row are 0: a 4-bit block may reach past its run, where its weights are 0, and past the last row's end.
RESQ_DEVICE void copy_codes(const GemmArgs& a, const CodeCursor& at, int block, uint32_t tile, int row_in_tile, int row,
                            int chunk) {
  if (!at.run.nibbles && chunk >= 2) return;
  const int64_t byte = at.byte(a, block) + 16 * chunk;
  const bool inside = row < a.m && byte < a.pitch;
  copy_async(tile + chunk_offset(row_in_tile, chunk), a.codes + (inside ? row * a.pitch + byte : 0), inside ? 16 : 0);
}

// acc += weights · codes of one block: kTiles tiles of 16 channels whose blocks lie at `weights`, 512 bytes each, and
// kTokens8 tiles of 8 tokens at `codes`, 512 bytes each.
//
// kInt4: 4-bit weights meet 4-bit codes (a byte each) in mma.m16n8k64. Its 64 columns may come in any order as long as A
// and B agree: two words of weights make a register of row g (low nibbles) and one of row g + 8 (high nibbles), whose even
// nibbles are the first word's columns and whose odd ones the second's; two words of codes make the register of B.
template <bool kInt4, int kTiles, int kTokens8>
RESQ_DEVICE void multiply_block(uint32_t weights, uint32_t codes, bool nibbles, int lane,
                                int32_t (&acc)[kTiles][kTokens8][4]) {
  const uint32_t matrix_row = chunk_offset(lane & 7, lane >> 3);
  uint4 words[kTiles];
#pragma unroll
  for (int c = 0; c < kTiles; ++c) words[c] = shared_load(weights + c * kBlockBytes + lane * 16);
  if (kInt4 && nibbles) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      const uint4 w = words[c];
      a[c][0] = pair_low_nibbles(w.x, w.y), a[c][1] = pair_high_nibbles(w.x, w.y);
      a[c][2] = pair_low_nibbles(w.z, w.w), a[c][3] = pair_high_nibbles(w.z, w.w);
    }
#pragma unroll
    for (int t = 0; t < kTokens8; ++t) {
      const uint4 b = load_matrices(codes + t * 512 + matrix_row);
#pragma unroll
      for (int c = 0; c < kTiles; ++c) mma_s4u4(acc[c][t], a[c], b.x | (b.y << 4), b.z | (b.w << 4));
    }
  } else if (nibbles) {
    uint32_t first[kTiles][4], second[kTiles][4];
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      const uint4 w = words[c];
      first[c][0] = low_nibbles(w.x), first[c][1] = high_nibbles(w.x);
      first[c][2] = low_nibbles(w.y), first[c][3] = high_nibbles(w.y);
      second[c][0] = low_nibbles(w.z), second[c][1] = high_nibbles(w.z);
      second[c][2] = low_nibbles(w.w), second[c][3] = high_nibbles(w.w);
    }
#pragma unroll
    for (int t = 0; t < kTokens8; ++t) {
      const uint4 b = load_matrices(codes + t * 512 + matrix_row);
#pragma unroll
      for (int c = 0; c < kTiles; ++c) mma_s8u8(acc[c][t], first[c], b.x, b.y);
#pragma unroll
      for (int c = 0; c < kTiles; ++c) mma_s8u8(acc[c][t], second[c], b.z, b.w);
    }
  } else {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
      a[c][0] = words[c].x, a[c][1] = words[c].y, a[c][2] = words[c].z, a[c][3] = words[c].w;
#pragma unroll
    for (int t = 0; t < kTokens8; ++t) {
      const uint4 b = load_matrices(codes + t * 512 + matrix_row);
#pragma unroll
      for (int c = 0; c < kTiles; ++c) mma_s8u8(acc[c][t], a[c], b.x, b.y);
    }
  }
}

}  // namespace resq::cuda
