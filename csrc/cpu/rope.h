// Rotary embedding of rows in place, checked and run.
#pragma once

#include "tensors.h"

namespace resq {

struct CosSin {
  const void* data;
  DType dtype;
  int64_t positions, head_dim;
};
CosSin cos_sin(const Tensor& cos_sin_cache);

// Throws unless every token has a position that the table knows.
const int64_t* check_positions(const Tensor& positions, int64_t tokens, const CosSin& table);

// The first `heads` heads of rows that lie `stride` elements apart.
void turn(void* x, int64_t tokens, int64_t stride, int64_t heads, const int64_t* positions, const CosSin& table);

}  // namespace resq
