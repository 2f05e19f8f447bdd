// The faster attention kernels, and which of them takes a call.
#pragma once

#include "kernels.h"

namespace resq {

using AttentionKernel = void (*)(const AttentionArgs&, const AttentionTask&);

// Work on a call's rotation that all of its prefill tasks share.
struct AttentionPreparation {
  int64_t (*bytes)(const AttentionArgs&) = nullptr;
  void (*fill)(const AttentionArgs&, uint8_t*) = nullptr;
};

#if defined(__x86_64__)
// Few query rows (simd/decode.h): vpdpbusd, AMX int8 tiles.
extern const AttentionKernel kDecodeVnni, kDecodeTiles;
// Many query rows (simd/prefill.h): vdpbf16ps, AMX bf16 tiles.
extern const AttentionKernel kPrefillBf16, kPrefillTiles;
extern const AttentionPreparation kPrefillPreparation;
#endif

// What runs the tasks of a call; null: Kernels::attention, the float32 kernel, which takes everything.
struct AttentionPaths {
  AttentionKernel decode = nullptr, prefill = nullptr;
  AttentionPreparation prepare;  // before prefill tasks
};

// For kernels `k` on this machine and pages, queries and output like those of `args`.
AttentionPaths attention_paths(const Kernels& k, const AttentionArgs& args);

}  // namespace resq
