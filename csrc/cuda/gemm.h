// The integer GEMM: arguments, kernels and their launcher. Host code without torch headers includes it too.
#pragma once

#include <cstdint>

#include "formats.h"
#include "weights.h"

namespace resq::cuda {

enum class Float : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// y [m, n] = sum over runs of float(I_r) * (x_scale * weight_scale), in the runs' order, + bias. All pointers are on the
// device; `runs` and `weight` are the two halves of a packed buffer (weights.h).
struct GemmArgs {
  const uint8_t* codes;  // formats.h: rows of both parts
  int64_t pitch;         // bytes of a row
  int32_t part_at[2];    // byte of a row where a part begins
  int32_t low_store;     // Store of the low part
  int32_t groups;
  const float* x_scale;   // [m, groups]
  const int32_t* x_zero;  // [m, groups]
  const GemmRun* runs;
  const uint8_t* weight;
  int32_t n_runs, blocks;
  const float* weight_scale;  // [scale rows, n]
  const int32_t* weight_sum;  // [runs, n]
  const void* bias;           // [n], or null
  void* out;                  // [m, n]
  Float bias_type, out_type;
  int32_t m, n;
  int32_t raw_run;    // -1; for tests a run r: out, as f32 without bias, gets the bits of the exact I_r
  int32_t splits;     // CTAs that share an output tile
  int32_t* partial;   // int32 [tiles][partial_slots][tile], where splits > 1
  uint32_t* arrived;  // [tiles], 0 before and after every launch
};

}  // namespace resq::cuda
