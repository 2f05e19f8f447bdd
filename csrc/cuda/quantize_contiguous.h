// The rows that quantize_contiguous.cuh takes: 16-bit values in one or two pieces that lie together in x as in the codes,
// each of whole vectors. These are the inputs of q, k, v, gate and up, and rows with one scale.
#pragma once

#include "quantize_args.h"

namespace resq::cuda {

struct Piece {
  int32_t vectors;     // of 8 columns
  int32_t at;          // byte of the row of codes where the row's first vector would lie, were it of this piece
  int32_t padding_at;  // first of the zero bytes after the codes,
  int32_t padding;     // and their number in words of 4 bytes: below 32, since parts are padded to kPitchBytes
  int32_t nibbles;     // two codes a byte
  int32_t levels;      // 2^bits - 1
  int32_t scale_index;
};

// One CTA quantizes one row.
struct ContiguousArgs {
  const void* x;
  int64_t x_stride;
  const void* weight;
  void* residual;
  int64_t residual_stride;
  float epsilon;
  int32_t columns, vectors;
  uint8_t* codes;
  int64_t row_bytes;
  float* scale;
  int32_t* zero;
  int32_t scale_groups;
  int32_t one_group;  // both pieces have one scale
  Piece piece[2];     // the second may be empty
};

constexpr int kHeldVectors = 4;     // that a thread holds where rows are many
constexpr int kFewRows = 256;       // up to here one row's latency counts: a vector a thread
constexpr int kHeldThreads = 512;   // at most, of the kernel with kHeldVectors
constexpr int kMostThreads = 1024;  // of the other

// Vectors that a thread holds of rows of `vectors` vectors, and the CTA's threads.
inline int held_vectors(int rows, int vectors) {
  return rows <= kFewRows && vectors <= kMostThreads ? 1 : kHeldVectors;
}
inline int contiguous_threads(int vectors, int held) {
  return static_cast<int>(round_up((vectors + held - 1) / held, 32));
}

// Whether the rows are such; fills `out`. `element`: bytes of x's type.
inline bool contiguous_rows(const QuantizeArgs& args, int element, ContiguousArgs& out) {
  if (element != 2 || !args.aligned || args.blocks != 1 || args.hadamard_n > 1 || args.silu_mul || args.out) return false;
  if (args.columns % kVector || args.columns > kVector * kHeldVectors * kHeldThreads) return false;
  out = {args.x,       args.x_stride, args.weight,            args.residual, args.residual_stride,
         args.epsilon, args.columns,  args.columns / kVector, args.codes,    args.row_bytes,
         args.scale,   args.zero,     args.scale_groups,      args.groups == 1, {}};
  // A byte a column and nothing more: Order::columns, or one part without padding.
  const bool by_columns = !args.part[1].codes && args.part[0].store == Store::u8 && args.part[0].codes == args.columns &&
                          args.row_bytes == args.columns;
  int pieces = 0, last_part = -1;
  for (int i = 0; i < args.spans; ++i) {
    int staged = static_cast<int>(args.span[i].at);
    const int end = static_cast<int>(args.span[i + 1].column);
    // A span of one group goes on into the high part where the low part has no padding.
    for (int column = static_cast<int>(args.span[i].column), columns; column < end; column += columns, staged += columns) {
      const int which = args.part[1].codes && staged >= args.part[1].staged;
      const PartOut& part = args.part[which];
      const int left = part.staged + part.codes - staged;
      columns = end - column < left ? end - column : left;
      if (pieces == 2 || columns <= 0 || column % kVector || columns % kVector) return false;
      // The zeros after a part's codes are its piece's.
      if (!by_columns && (which == last_part || staged != part.staged)) return false;
      last_part = which;
      const Group& group = args.group[args.span[i].group];
      Piece& piece = out.piece[pieces++];
      piece.vectors = columns / kVector;
      piece.nibbles = part.store == Store::u4;
      piece.levels = (1 << group.bits) - 1;
      piece.scale_index = static_cast<int32_t>(group.index);
      const int64_t start = part.out + stored_bytes(staged - part.staged, part.store);
      piece.at = static_cast<int32_t>(start - stored_bytes(column, part.store));
      piece.padding_at = static_cast<int32_t>(start + stored_bytes(columns, part.store));
      if (!by_columns)
        piece.padding = static_cast<int32_t>((stored_bytes(part.codes - columns, part.store) + part.tail) / 4);
    }
  }
  return true;
}

}  // namespace resq::cuda
