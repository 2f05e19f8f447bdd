#include "attention_kernels.h"

#include <cstring>

namespace resq {

#if defined(__x86_64__)
namespace {
constexpr int64_t kTileHighDims = 64;  // of K's high part, that one tile holds
}

AttentionPaths attention_paths(const Kernels& k, const AttentionArgs& args) {
  // 8-bit low parts are rare, and float32 callers want float32 results.
  if (args.page.low_bits != 4 || args.query_dtype == DType::f32 || args.out_dtype == DType::f32) return {};
  if (std::strcmp(k.name, "avx512_vnni") == 0) return {kDecodeVnni, nullptr};
  if (std::strcmp(k.name, "amx_int8") == 0)
    return {args.page.high_padded <= kTileHighDims ? kDecodeTiles : kDecodeVnni, nullptr};
  return {};
}
#else
AttentionPaths attention_paths(const Kernels&, const AttentionArgs&) { return {}; }
#endif

}  // namespace resq
