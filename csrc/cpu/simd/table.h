// The function table of the TU that includes this last.
#pragma once

#include "attention.h"
#include "float_rows.h"
#include "gemm_int8.h"
#include "kv_write.h"
#include "rope.h"

namespace resq {
namespace {

template <Reading R>
constexpr Kernels make_kernels(const char* name) {
  return {name,          quantize_units,   linear_superblocks<R>, abreast<R>,  kLeastPanelRows,
          hadamard_rows, float_rows_input, float_rows,            rope_tokens, kv_write_tokens,
          attention_float, merge_shares};
}

}  // namespace
}  // namespace resq
