#include "attention_kernels.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace resq {

#if defined(__x86_64__)
namespace {

constexpr int64_t kTileHighDims = 64;    // of K's high part, that one tile holds
constexpr int64_t kInt16HighDims = 256;  // of which int16 times code stays below 2^31

struct Features {
  bool amx_bf16 = false;
};

Features detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Features f;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) f.amx_bf16 = d & (1u << 22);
  return f;
}

const Features& features() {
  static const Features found = detect();
  return found;
}

}  // namespace

AttentionPaths attention_paths(const Kernels& k, const AttentionArgs& args) {
  // 8-bit low parts and negative scales are rare, and float32 callers want float32 results.
  const bool full_precision = args.query_dtype == DType::f32 || args.out_dtype == DType::f32;
  if (args.page.low_bits != 4 || !(args.scale > 0.0f) || full_precision) return {};
  const bool tiles = std::strcmp(k.name, "amx_int8") == 0;  // chosen only where the process may use tiles
  if (!tiles && std::strcmp(k.name, "avx512_vnni") != 0) return {};
  AttentionPaths paths;
  paths.narrow_decode = kDecodeVnni;
  paths.decode = tiles && args.page.high_padded <= kTileHighDims ? kDecodeTiles : kDecodeVnni;
  // q and P in bfloat16, or in int16, are no less exact than a bfloat16 model's own; a float16 model's are finer.
  if (args.query_dtype == DType::bf16) {
    if (tiles && features().amx_bf16) {
      paths.prefill = kPrefillTiles;
      paths.prepare = kPrefillPreparation;
    } else if (args.page.high_padded <= kInt16HighDims) {
      paths.prefill = kPrefillInt16;
      paths.prepare = kInt16Preparation;
    }
  }
  return paths;
}

KVTileWriter kv_tile_writer(const Kernels& k, const KVWriteArgs& args, int64_t tiles) {
  // Splitting U_C takes as long as the rotation of two tiles in float32.
  constexpr int64_t kFewTiles = 4;
  const bool amx = std::strcmp(k.name, "amx_int8") == 0;
  if (!amx && std::strcmp(k.name, "avx512_vnni") != 0) return {};
  const bool rotates = args.rotation && args.dtype == DType::bf16 && tiles * args.heads >= kFewTiles;
  return amx && features().amx_bf16 && rotates ? kAmxTileWriter : kFloatTileWriter;
}

std::string describe_attention(const Kernels& k, const AttentionArgs& args) {
  const AttentionPaths paths = attention_paths(k, args);
  const bool wide = std::strcmp(k.name, "amx_int8") == 0 || std::strcmp(k.name, "avx512_vnni") == 0;
  std::string reason;
  if (!wide) {
    reason = std::string(" (the only one for ") + k.name + ")";
  } else if (args.page.low_bits != 4) {
    reason = " because the cache's low part has 8 bits";
  } else if (args.query_dtype != DType::bf16) {
    reason = std::string(" because the model is ") + (args.query_dtype == DType::f16 ? "float16" : "float32");
  } else {
    reason = " because more than " + std::to_string(kInt16HighDims) + " dims have 8 bits";
  }
  const std::string plain = "float32" + reason;
  const std::string decode = paths.decode == kDecodeTiles  ? "int8 AMX"
                             : paths.decode == kDecodeVnni ? "int8 AVX512-VNNI"
                                                           : plain;
  const std::string prefill = paths.prefill == kPrefillTiles   ? "bfloat16 AMX"
                              : paths.prefill == kPrefillInt16 ? "int16 AVX512-VNNI"
                                                               : plain;
  return "decode " + decode + ", prefill " + prefill;
}
#else
AttentionPaths attention_paths(const Kernels&, const AttentionArgs&) { return {}; }
KVTileWriter kv_tile_writer(const Kernels&, const KVWriteArgs&, int64_t) { return {}; }
std::string describe_attention(const Kernels& k, const AttentionArgs&) {
  const std::string plain = std::string("float32 (the only one for ") + k.name + ")";
  return "decode " + plain + ", prefill " + plain;
}
#endif

}  // namespace resq
