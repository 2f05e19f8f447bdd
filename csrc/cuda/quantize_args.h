// What the quantize kernels are told: one plain struct, passed by value, so that a launch needs no memory of its own and
// a captured CUDA graph holds everything.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace resq::cuda {

constexpr int kVector = 8;         // columns that a thread loads at once: 16 bytes of a 16-bit type
constexpr int kMaxSpans = 256;     // o_proj of 128 heads, head by head [low | high]
constexpr int kMaxGroups = 256;    // the same, each with scales of its own
constexpr int kMaxColumns = 1 << 20;

// A stretch of x's columns that lies together in the codes. The end is the next span's column.
struct Span {
  uint32_t column : 20;
  uint32_t group : 12;  // index in QuantizeArgs.groups
  uint32_t at;          // first byte in the CTA's staging row of one code a byte
};

struct Group {
  uint32_t index : 12;  // of block 0 in scale and zero
  uint32_t step : 12;   // added for every further block
  uint32_t bits : 8;
};

// A part's share of the staging row, and where it goes.
struct PartOut {
  int32_t staged;      // first byte in the staging row
  int32_t codes;       // staged codes, padding included; 0 = the part is absent
  int64_t out;         // first byte in the row of codes
  int64_t block_step;  // added for every further block
  int32_t tail;        // zero bytes after the last block's codes: the pitch's padding
  Store store;
};

// One CTA quantizes one block of one row: a whole row, or, where no activation group reaches across Hadamard blocks, as
// few of those as hold whole groups.
struct QuantizeArgs {
  const void* x;        // [M, blocks * columns]; silu(gate) * up reads the row's second half too
  int64_t x_stride;     // elements between rows
  const void* weight;   // of RMSNorm [columns], x's type
  void* residual;       // [M, columns] or null: replaced by x + residual
  int64_t residual_stride;
  float epsilon;
  int32_t rows, blocks, columns;  // columns of a block
  int32_t aligned;      // x (and weight, residual) can be read 16 bytes at a time
  int32_t silu_mul;     // the row is [gate | up]

  int32_t hadamard_n;   // columns of a Hadamard block, 0 = no transform
  int32_t hadamard_k;   // order of the dense factor, 1 = none
  const float* dense;   // H_k [k, k]
  float root;           // sqrt(hadamard_n)

  uint8_t* codes;       // [M, row_bytes]
  int64_t row_bytes;
  int32_t codes_aligned;  // every part of every row and block starts and ends at a multiple of 16 bytes
  float* scale;         // [M, scale_groups]
  int32_t* zero;
  int32_t scale_groups;
  void* out;            // of the op `hadamard`: [M, blocks * columns] of x's type instead of codes

  int32_t staging;      // bytes of the staging row, a multiple of 16
  int32_t spans, groups;
  PartOut part[2];
  Span span[kMaxSpans + 1];  // the last one's column is `columns`
  Group group[kMaxGroups];
};
static_assert(sizeof(QuantizeArgs) <= 4096, "kernel parameters of every driver");

// The tables of one CTA, at the start of its shared memory: 9 KiB.
struct RowState {
  Span span[kMaxSpans + 1];
  // Extrema as bits of non-negative floats, whose order is that of the integers: -min(x, 0) and max(x, 0).
  uint32_t low[kMaxGroups], high[kMaxGroups];
  Divisor divisor[kMaxGroups];
  int32_t zero[kMaxGroups];
  float scratch[32];
};
constexpr int64_t kStateBytes = round_up(sizeof(RowState), 16);

// Dynamic shared memory of the quantize kernel: tables, row (elements of `element` bytes), staging row.
RESQ_HD constexpr int64_t quantize_shared_bytes(int64_t columns, int64_t element, int64_t staging) {
  return kStateBytes + round_up(columns, kVector) * element + staging;
}

// Of the Hadamard kernel: tables, values, staging row; with a dense factor, a second buffer of values comes last, while
// the staging row takes the place of the first.
RESQ_HD constexpr int64_t second_buffer_at(int64_t columns, int64_t k, int64_t staging) {
  const int64_t row = round_up(columns * 4, 16);
  return kStateBytes + (k > 1 && staging > row ? staging : row);
}
RESQ_HD constexpr int64_t hadamard_shared_bytes(int64_t columns, int64_t k, int64_t staging) {
  return second_buffer_at(columns, k, staging) + (k > 1 ? round_up(columns * 4, 16) : staging);
}

}  // namespace resq::cuda
