// The quantized activations that the quantize kernels write and the GEMMs read. Normative for both.
//
// x [M, K] under a LinearPlan (resq_vllm/formats/plan.py) becomes unsigned codes in *part order*: the low part's columns,
// then the high part's, each in the order of its runs. Per part:
//   - a run starts at a multiple of kRunColumns columns and is padded to one: run r of the part lies at padded columns
//     [at, at + padded), of which the first `length` are real;
//   - the row is padded to a multiple of kPitchBytes bytes;
//   - every padding code is 0, and so is every weight that it meets: products of padding vanish, no tail code is needed;
//   - codes are stored as Store::u8, a byte each (codes of 4-bit groups are 0..15, of 8-bit groups 0..255), or, for a low
//     part whose groups are all 4-bit and only on request, as Store::u4, two a byte with the even column in the low nibble.
// A row of the tensor `codes` uint8 [M, row_bytes] is the low part's pitch bytes, then the high part's; a part without
// columns takes none. Rows are exactly M: reading row M is out of bounds. Row and part starts are aligned to kPitchBytes
// where the tensor is (torch's allocator aligns to 512). Beside them, as in resq_vllm/reference.py: scale float32 [M, G],
// zero int32 [M, G], by activation group.
//
// The GEMM multiplies u8 or u4 codes with s8 or s4 weights (mma.sync and wgmma take mixed signs), so that
// I_r = sum q_x q_w - zero * sum q_w, with the column sums of pack_weight, exactly as in resq_vllm/reference.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RESQ_HD __host__ __device__ __forceinline__
#else
#define RESQ_HD inline
#endif

namespace resq::cuda {

constexpr int kRunColumns = 32;   // columns: one k-step of the 8-bit tensor-core instructions
constexpr int kPitchBytes = 128;  // bytes: a row starts on a cache line and a 128-byte shared-memory swizzle atom

enum class Store : int32_t { u8 = 0, u4 = 1 };

RESQ_HD constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Columns that a run of `length` columns takes in its part.
RESQ_HD constexpr int64_t padded_columns(int64_t length) { return round_up(length, kRunColumns); }

// Bytes of `columns` padded columns: a multiple of 16 (u4) or 32 (u8).
RESQ_HD constexpr int64_t stored_bytes(int64_t columns, Store store) { return store == Store::u4 ? columns / 2 : columns; }

// Bytes of a part's row of `columns` padded columns, 0 for a part without columns.
RESQ_HD constexpr int64_t part_pitch(int64_t columns, Store store) {
  return round_up(stored_bytes(columns, store), kPitchBytes);
}

// Byte of padded column `column` in its part's row.
RESQ_HD constexpr int64_t code_byte(int64_t column, Store store) { return store == Store::u4 ? column >> 1 : column; }

// The code of padded column `column`, of a part's row.
RESQ_HD uint32_t code_at(const uint8_t* row, int64_t column, Store store) {
  const uint32_t byte = row[code_byte(column, store)];
  return store == Store::u4 ? (byte >> (4 * (column & 1))) & 15u : byte;
}

// Eight codes 0..15, one a byte in column order (`low4` the first four), as one word of nibbles: column i at bits 4i.
RESQ_HD constexpr uint32_t pack_nibbles(uint32_t low4, uint32_t high4) {
  // Per half: bytes b0 b1 b2 b3 -> b0 | b1<<4 in byte 0 and b2 | b3<<4 in byte 2, then both together in the low half.
  const uint32_t a = low4 | (low4 >> 4), b = high4 | (high4 >> 4);
  const uint32_t first = (a & 0xffu) | ((a >> 8) & 0xff00u), second = (b & 0xffu) | ((b >> 8) & 0xff00u);
  return first | (second << 16);
}

// A run's place, for kernels: everything in columns of its padded part.
struct RunSpan {
  int32_t part;       // 0 low, 1 high
  int32_t group;      // of scale and zero
  int32_t scale_row;  // of the weight scales
  int32_t at;         // first padded column in the part
  int32_t length;     // real columns
  int32_t padded;     // columns taken: padded_columns(length)
};

// Quantized activations of M tokens as kernels see them.
struct QuantizedActivations {
  const uint8_t* part[2];  // first byte of row 0 of the part, or null
  int64_t pitch;           // bytes between rows (of both parts)
  const float* scale;      // [M, groups]
  const int32_t* zero;     // [M, groups]
  int32_t groups;
  Store store[2];
};

}  // namespace resq::cuda
