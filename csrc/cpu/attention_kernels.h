// The faster attention kernels, and which of them takes a call.
#pragma once

#include <string>

#include "kernels.h"

namespace resq {

using AttentionKernel = void (*)(const AttentionArgs&, const AttentionTask&);

// Work on a call's rotation that all of its prefill tasks share.
struct AttentionPreparation {
  int64_t (*bytes)(const AttentionArgs&) = nullptr;
  void (*fill)(const AttentionArgs&, uint8_t*) = nullptr;
};

// Writes whole tiles of pages: units [begin, end) of `tiles` (their first tokens' numbers in the call) x heads. `bytes`
// and `fill` make KVWriteArgs::prepared; null where it needs none.
struct KVTileWriter {
  void (*write)(const KVWriteArgs&, const int64_t* tiles, int64_t begin, int64_t end) = nullptr;
  int64_t (*bytes)(const KVWriteArgs&) = nullptr;
  void (*fill)(const KVWriteArgs&, uint8_t*) = nullptr;
};

#if defined(__x86_64__)
// U_C in float32; in three bfloat16 terms on AMX tiles.
extern const KVTileWriter kFloatTileWriter, kAmxTileWriter;
// Few query rows (simd/decode.h): vpdpbusd, AMX int8 tiles.
extern const AttentionKernel kDecodeVnni, kDecodeTiles;
// Many query rows: vpdpwssd (simd/prefill_int16.h), AMX bf16 tiles (simd/prefill.h).
extern const AttentionKernel kPrefillInt16, kPrefillTiles;
extern const AttentionPreparation kInt16Preparation, kPrefillPreparation;
#endif

// Query rows of a kv head up to which vpdpbusd on the packed codes is as fast as spreading them for tiles, which take 0.88
// of its time with three or four rows.
constexpr int64_t kNarrowRows = 2;

// What runs the tasks of a call; null: Kernels::attention, the float32 kernel, which takes everything.
struct AttentionPaths {
  AttentionKernel decode = nullptr, prefill = nullptr;
  AttentionKernel narrow_decode = nullptr;  // up to kNarrowRows query rows
  AttentionPreparation prepare;  // before prefill tasks
};

// For kernels `k` on this machine and pages, queries and output like those of `args`.
AttentionPaths attention_paths(const Kernels& k, const AttentionArgs& args);

// Which kernels those are, in words: "decode int8 AMX, prefill bfloat16 AMX", with the reason for a float32 one.
std::string describe_attention(const Kernels& k, const AttentionArgs& args);

// For kernels `k` and `tiles` whole tiles to write; without a `write` all tokens are written one by one.
KVTileWriter kv_tile_writer(const Kernels& k, const KVWriteArgs& args, int64_t tiles);

}  // namespace resq
