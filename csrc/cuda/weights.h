// The weights' layout in device memory, the same for every kernel, as index maths for host and device.
//
// W [N, K] is cut into tiles of 16 channels. A tile is a stream of *blocks* of 512 bytes, run after run in the plan's order
// (formats.h: RunSpan). A block is what one warp multiplies after one 16-byte load a lane: 64 columns of 4-bit weights or
// 32 columns of 8-bit weights, in the order of the A fragments of mma.m16n8k32 (wgmma's A registers have the same order):
// lane 4g + q holds rows g and g + 8 of the instruction, columns 4q..4q+3 and 16+4q..16+4q+3 of each k-step.
// Instruction row g is the tile's channel 2g and row g + 8 its channel 2g + 1, so that a lane ends up with two neighbouring
// channels and stores them together: 8 lanes fill a 32-byte sector of 16-bit outputs.
//
// A 4-bit block: byte i of word j of the lane = column 16j + 4q + i, channel 2g in the low nibble, 2g + 1 in the high one.
// (v << 4) & 0xf0f0f0f0 and v & 0xf0f0f0f0 are then two registers of int8 = 16·w. Sums are 16·I; they fit int32 as long as
// 16·8·255·K < 2^31, K <= 65793 columns a run (1.1 million with 4-bit activations). 8-bit: 128·255·K < 2^31, the same K.
// The buffer `packed`: table of GemmRun, padded to kTableBytes, then the tiles. Weights beyond N, beyond a run's columns
// and at its padding are 0.
#pragma once

#include <cstdint>

#include "formats.h"

namespace resq::cuda {

constexpr int kTileChannels = 16;
constexpr int kBlockBytes = 512;
constexpr int kTableBytes = 512;   // the table of runs is padded to it, so that tiles start on their alignment
constexpr int64_t kMaxRunColumns = 65792;

RESQ_HD constexpr int block_columns(bool nibbles) { return nibbles ? 64 : 32; }

// A run as the kernels see it.
struct alignas(16) GemmRun {
  int32_t part;         // whose codes
  int32_t at;           // first padded column in the part
  int32_t length;       // real columns
  int32_t group;        // of the activations' scale and zero point
  int32_t scale_row;    // of the weight scales
  int32_t first_block;  // in a tile's stream
  int32_t blocks;
  int32_t nibbles;      // 1: 4-bit weights
};

RESQ_HD constexpr int32_t run_blocks(int32_t length, bool nibbles) {
  return (length + block_columns(nibbles) - 1) / block_columns(nibbles);
}

RESQ_HD constexpr int64_t table_bytes(int64_t runs) { return round_up(runs * sizeof(GemmRun), kTableBytes); }
RESQ_HD constexpr int64_t weight_tiles(int64_t n) { return (n + kTileChannels - 1) / kTileChannels; }
RESQ_HD constexpr int64_t packed_bytes(int64_t runs, int64_t n, int64_t blocks) {
  return table_bytes(runs) + weight_tiles(n) * blocks * kBlockBytes;
}

// Channel of a tile that instruction row `row` (0..15) computes, and back.
RESQ_HD constexpr int channel_of_row(int row) { return 2 * (row & 7) + (row >> 3); }
RESQ_HD constexpr int row_of_channel(int channel) { return (channel >> 1) + 8 * (channel & 1); }

// Where weight (channel of the tile, column of the block) lies: byte of the block, and for 4 bits the nibble's shift.
struct WeightPlace {
  int byte, shift;
};

RESQ_HD constexpr WeightPlace weight_place(int channel, int column, bool nibbles) {
  const int g = channel >> 1, second = channel & 1, q = (column >> 2) & 3, i = column & 3, word = column >> 4;
  const int lane = 4 * g + q;
  // 8 bit: words a0..a3 are (row g, first 16 columns), (row g + 8, first), (row g, last 16), (row g + 8, last).
  if (nibbles) return {16 * lane + 4 * word + i, 4 * second};
  return {16 * lane + 4 * (2 * word + second) + i, 0};
}

// The inverse, for the kernel that packs: what byte `byte` of a block holds. 4 bit: `channel` is the low nibble's, the
// high nibble's is the next.
struct WeightSource {
  int channel, column;
};

RESQ_HD constexpr WeightSource weight_source(int byte, bool nibbles) {
  const int lane = byte >> 4, word = (byte >> 2) & 3, i = byte & 3, g = lane >> 2, q = lane & 3;
  if (nibbles) return {2 * g, 16 * word + 4 * q + i};
  return {2 * g + (word & 1), 16 * (word >> 1) + 4 * q + i};
}

// Checkpoint weights of one part: 4-bit, two a byte with the even column in the low nibble, or int8.
struct PartWeights {
  const uint8_t* data;
  int64_t row_bytes;
  bool nibbles;
};

RESQ_HD int weight_at(const PartWeights& part, int64_t channel, int64_t column) {
  if (!part.nibbles) return static_cast<int8_t>(part.data[channel * part.row_bytes + column]);
  const int byte = part.data[channel * part.row_bytes + (column >> 1)];
  const int nibble = (byte >> (4 * (column & 1))) & 15;
  return nibble >= 8 ? nibble - 16 : nibble;
}

// Byte `byte` of block `block` of tile `tile`; `start` is the run's first column in its part's checkpoint tensor.
RESQ_HD uint8_t packed_byte(const PartWeights& part, const GemmRun& run, int64_t start, int64_t n, int64_t tile,
                            int32_t block, int byte) {
  const WeightSource at = weight_source(byte, run.nibbles != 0);
  const int64_t column = static_cast<int64_t>(block - run.first_block) * block_columns(run.nibbles != 0) + at.column;
  if (column >= run.length) return 0;
  const int64_t channel = tile * kTileChannels + at.channel;
  const int first = channel < n ? weight_at(part, channel, start + column) : 0;
  if (!run.nibbles) return static_cast<uint8_t>(first);
  const int second = channel + 1 < n ? weight_at(part, channel + 1, start + column) : 0;
  return static_cast<uint8_t>((first & 15) | ((second & 15) << 4));
}

// A lane's word of a 4-bit block as two registers of int8 = 16·w.
RESQ_HD uint32_t low_nibbles(uint32_t word, uint32_t mask = 0xf0f0f0f0u) { return (word << 4) & mask; }
RESQ_HD uint32_t high_nibbles(uint32_t word, uint32_t mask = 0xf0f0f0f0u) { return word & mask; }


// Two words of a 4-bit block as two registers of int4: the first word's weights in the even nibbles.
RESQ_HD uint32_t pair_low_nibbles(uint32_t first, uint32_t second) {
  return (first & 0x0f0f0f0fu) | ((second << 4) & 0xf0f0f0f0u);
}
RESQ_HD uint32_t pair_high_nibbles(uint32_t first, uint32_t second) {
  return ((first >> 4) & 0x0f0f0f0fu) | (second & 0xf0f0f0f0u);
}

}  // namespace resq::cuda
