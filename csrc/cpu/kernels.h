// The interface between the torch-facing code and the compute kernels: plain structs, one function table per ISA.
//
// The kernels are compiled once per instruction set. They see no torch headers and no std containers, so no template
// compiled for a newer instruction set can be merged by the linker into code that runs on an older machine.
#pragma once

#include <cstdint>

namespace resq {

enum class DType : int32_t { f32, f16, bf16 };

constexpr int64_t kSuperblock = 64;  // output columns of a weight superblock
constexpr int64_t kTokenTile = 16;   // tokens of a tile of a KV page
constexpr int64_t kMaxHeadDim = 512;

// A stretch of x's columns with one activation group, and its place in the padded, run-ordered activation row.
struct SegmentPlace {
  int64_t column, columns;  // in x
  int64_t at;               // first byte in the padded row
  int64_t pad;              // zero bytes after it (only the last segment of a run has any)
  int32_t group, run;
};

// One exact int32 accumulation: a part's columns that share an activation group and a weight scale.
struct RunPlace {
  int32_t part, group;
  int32_t scale_row;     // of the weight scales
  bool nibbles;          // 4-bit weights (otherwise 8-bit)
  int64_t length;        // real columns
  int64_t padded;        // columns with padding: a multiple of 8
  int64_t start;         // first column in the part
  int64_t activation_at; // first byte in the padded activation row
  int64_t weight_at;     // first byte in a superblock
};

struct PlanView {
  const SegmentPlace* segments;
  const RunPlace* runs;
  const int32_t* group_bits;
  // Columns that can be transformed and quantized on their own: one block per Hadamard block where the activation
  // groups allow it, otherwise a single one. Prefix arrays of length blocks + 1.
  const int32_t* block_segments;
  const int32_t* block_groups;
  const int32_t* group_list;  // group numbers, block by block
  int64_t n_runs, n_groups, blocks;
  int64_t columns, padded_columns, superblock_bytes;
};

struct HadamardArgs {
  int64_t groups;      // blocks of a row, 0 = no transform
  int64_t k;           // order of the dense factor, 1 = none
  const float* dense;  // H_k [k, k]
};

// What happens to x before its Hadamard transform and quantization, in float32, results rounded to x's dtype.
enum class Before : int32_t {
  nothing,
  rms_norm,  // of x, or of x + residual, whose rounded sum goes to residual_out where that is not null
  silu_mul,  // a row of x is [gate | up]
};

struct BeforeArgs {
  Before kind;
  const void* residual;  // rows of the plan's columns, or null
  void* residual_out;    // other memory: each of several threads may read the residual for itself
  int64_t residual_stride, residual_out_stride;
  const void* weight;  // [columns], x's dtype
  float epsilon;
};

struct QuantizeArgs {
  const void* x;
  DType dtype;
  int64_t row_stride;
  BeforeArgs before;
  PlanView plan;
  HadamardArgs hadamard;
  bool column_order;  // codes are uint8 in x's column order (otherwise the GEMM's padded int8 operand)
  void* codes;
  int64_t code_stride;
  float* scale;   // [rows, groups]
  int32_t* zero;  // [rows, groups]
  int32_t* sums;  // [rows, runs]: sums of the int8 operand (unused in column order)
};

struct LinearArgs {
  PlanView plan;
  const uint8_t* packed;
  const float* weight_scale;  // [scale rows, n]
  const int32_t* weight_sum;  // [runs, n]
  const void* bias;           // [n] or null
  DType bias_dtype;
  int64_t n;
  const int8_t* codes;
  int64_t code_stride;
  const float* scale;
  const int32_t* zero;
  const int32_t* sums;
  void* out;
  DType out_dtype;
  int64_t out_stride;
  bool out_past_caches;  // the output would only displace what is read again
};

// y [rows, n] = x·Wᵀ of few rows, all bfloat16.
struct FloatRowsArgs {
  const uint16_t *x, *weight, *bias;  // weight [n, columns]; bias [n] or null
  uint16_t* out;
  int64_t rows, row_stride, n, columns;
  int64_t padded;  // pairs of columns in whole vectors of any ISA
};

struct HadamardRowsArgs {
  const void* x;
  void* out;
  DType dtype;
  int64_t columns, x_stride, out_stride;
  HadamardArgs hadamard;
};

// The first `heads` heads of every token's row, turned by its position.
struct RopeArgs {
  void* x;
  DType dtype;  // of x and cos_sin
  int64_t token_stride, heads, head_dim;
  const void* cos_sin;  // [positions, head_dim]: cosines of half a head, then sines
  const int64_t* positions;
};

// The packed KV page (resq_vllm/formats/kv_layout.py): plane offsets in bytes.
struct PageLayout {
  int64_t head_dim, low, high, low_padded, high_padded, low_bits, parts;
  int64_t tokens;  // of a page
  int64_t key_low, key_high, value_low, value_high, scales, zeros, bytes;
};

struct KVWriteArgs {
  PageLayout page;
  const void *key, *value;
  DType dtype;
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  uint8_t* cache;
  int64_t block_stride, head_stride;
  const int64_t* slots;
  const float* rotation;  // [head_dim, head_dim] or null
  int64_t heads;
  const void* prepared;  // what KVTileWriter::fill made for this call
};

struct AttentionArgs {
  PageLayout page;
  const void* query;
  void* out;
  DType query_dtype, out_dtype;
  int64_t query_token_stride, query_head_stride, out_token_stride, out_head_stride;
  const uint8_t* cache;
  int64_t block_stride, head_stride;
  const int32_t* block_table;
  int64_t block_table_stride;
  const float* rotation;  // [head_dim, head_dim] or null
  float scale;
  int64_t group;   // query heads of a kv head
  int64_t window;  // tokens visible to a query, its own included; -1 = all
  const void* prepared;  // what AttentionPaths::prepare made for this call
};

// Query tokens of one sequence and heads of some of its kv heads against keys [key_begin, key_end).
struct AttentionTask {
  int64_t sequence;
  int64_t kv_head, kv_heads;  // the first, and how many
  int64_t query_row;    // row of the first query token in `query` and `out`
  int64_t queries;      // query tokens
  int64_t position;     // position of the first query token in its sequence
  int64_t key_begin, key_end;
  // A share of a split context writes its unnormalised sum [rows, width], maximum and denominator here; null = whole.
  // Rows are ordered by kv head, query token, head of the group.
  float *partial_sum, *partial_max, *partial_denominator;
};

// The shares of one task's context, to be merged into `out`.
struct AttentionMerge {
  const AttentionTask* shares;
  int64_t count;
};

// How few tokens read weights, which takes as long as the memory lets it. side_by_side: several stretches at once, each
// line asked for 2 KiB ahead. in_order: one stretch, left to the processor's own prefetching.
enum class Reading { side_by_side, in_order };

struct Kernels {
  const char* name;
  // Units [begin, end) of rows x plan.blocks.
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);
  // Superblocks [superblock, superblock_end) of output columns for rows [begin, end).
  void (*linear)(const LinearArgs&, int64_t superblock, int64_t superblock_end, int64_t begin, int64_t end);
  // Superblocks of a call that make `linear` read fastest for so few rows.
  int64_t (*abreast)(int64_t rows);
  // Rows that `linear` should be given together however many columns they have.
  int64_t panel_rows;
  void (*hadamard)(const HadamardRowsArgs&, int64_t begin, int64_t end);
  // x as the next one takes it, in memory of the calling thread; outputs [begin, end).
  const float* (*float_rows_input)(const FloatRowsArgs&);
  void (*float_rows)(const FloatRowsArgs&, const float* x, int64_t begin, int64_t end);
  // Tokens [begin, end).
  void (*rope)(const RopeArgs&, int64_t begin, int64_t end);
  void (*kv_write)(const KVWriteArgs&, int64_t begin, int64_t end);
  void (*attention)(const AttentionArgs&, const AttentionTask&);
  void (*attention_merge)(const AttentionArgs&, const AttentionMerge&);
};

// Floats per row of a partial sum: the padded head, rounded up to the widest vector.
inline int64_t attention_width(const PageLayout& page) {
  return (page.low_padded + page.high_padded + 15) / 16 * 16;
}

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512InOrderKernels;
extern const Kernels kAmxKernels;
#endif

// A buffer of at least `bytes`, aligned to 64, that belongs to the calling thread and lives until it ends or asks for
// more from the same slot. Each slot has one user, so nested calls never share one.
enum class Slot : int {
  activation_row, hadamard, group_range, inline_codes, panel_codes, tiles, kv_rows, attention, float_rows, count
};
void* thread_scratch(Slot slot, int64_t bytes);

}  // namespace resq
