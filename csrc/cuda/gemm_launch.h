// Launchers of the GEMM kernels and of the kernels that pack weights, as launch.h: null, or the runtime's words.
#pragma once

#include "gemm.h"
#include "gemm_table.h"

using cudaStream_t = struct CUstream_st*;

namespace resq::cuda {

// What the device says of itself: all of Chip but `wgmma` and `int4`. Asked once a device.
const char* current_chip(int device, Chip& chip);

const char* launch_gemm(const Choice& choice, const Chip& chip, const GemmArgs& args, cudaStream_t stream);

// Where one of the families is compiled.
const char* launch_decode(int32_t kernel, bool overlap, const GemmArgs& args, cudaStream_t stream);
const char* launch_tiled(int32_t kernel, bool overlap, const GemmArgs& args, cudaStream_t stream);
const char* launch_int4(int32_t kernel, const GemmArgs& args, cudaStream_t stream);
const char* launch_wgmma(int32_t kernel, int processors, const GemmArgs& args, cudaStream_t stream);

// packed [table_bytes | tiles] and column sums [runs, n] from a checkpoint's weights, all on the device but `runs` and
// `start`, which are copied: the stream is waited for.
const char* launch_pack(const PartWeights (&parts)[2], const GemmRun* runs, const int64_t* start, int32_t n_runs,
                        int32_t blocks, int64_t n, uint8_t* packed, int32_t* sums, cudaStream_t stream);

const char* clear(void* p, int64_t bytes, cudaStream_t stream);

}  // namespace resq::cuda
