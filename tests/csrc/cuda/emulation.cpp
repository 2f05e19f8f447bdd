// The CUDA kernels' own source on the host, behind C functions for ctypes.
#define RESQ_DEVICE_EMULATOR "emulator.h"
#include "gemm_kernels.h"
#include "gemm_plan.h"
#include "gemm_table.h"

using namespace resq::cuda;

namespace {

struct Problem {
  const int32_t* spans;  // [runs, 6]: the fields of RunSpan
  int64_t n_runs, low_bits, m, n, groups, pitch;
  int64_t part_at[2];
  const uint8_t* low;
  const uint8_t* high;
  int64_t low_row_bytes, high_row_bytes;
  const uint8_t* codes;
  const float* x_scale;
  const int32_t* x_zero;
  const float* weight_scale;
  int64_t scale_rows;
  const int32_t* weight_sum;
  const void* bias;
  int64_t bias_type, out_type, raw_run, splits, grid, seed;
  void* out;
  uint8_t* packed;
  uint64_t conflicts;
};

GemmPlan plan_of(const Problem& p) {
  std::vector<RunSpan> spans;
  for (int64_t r = 0; r < p.n_runs; ++r) {
    const int32_t* s = p.spans + 6 * r;
    spans.push_back({s[0], s[1], s[2], s[3], s[4], s[5]});
  }
  return make_gemm_plan(spans, static_cast<int>(p.low_bits));
}

void expose(const void* p, size_t bytes, bool constant = false) {
  if (p) emulator::buffers.push_back({static_cast<const uint8_t*>(p), bytes, constant});
}

size_t float_bytes(int64_t type) { return type == 0 ? 4 : 2; }

template <class S>
void launch(const GemmArgs& a, Problem& p, int partial_quads, int channel_tiles, int token_tiles,
            void (*kernel)(const GemmArgs&)) {
  const int tiles = channel_tiles * token_tiles;
  std::vector<int4> partial(static_cast<size_t>(tiles) * partial_slots(a.splits, a.n_runs) * partial_quads);
  for (int4& v : partial) v = {0x55555555, 0x55555555, 0x55555555, 0x55555555};
  std::vector<uint32_t> arrived(tiles, 0);
  GemmArgs args = a;
  args.partial = reinterpret_cast<int32_t*>(partial.data());
  args.arrived = arrived.data();
  expose(partial.data(), partial.size() * sizeof(int4));
  expose(arrived.data(), arrived.size() * 4);
  p.conflicts = emulator::launch(tiles, a.splits, S::kThreads, S::kSharedBytes, static_cast<uint32_t>(p.seed), [&] {
    kernel(args);
    emulator::require_waited();
  });
  for (uint32_t count : arrived) emulator::require(count == 0, "a counter of arrivals was not left at 0");
}

}  // namespace

extern "C" {

int64_t resq_packed_bytes(const Problem* p) { return packed_bytes(p->n_runs, p->n, plan_of(*p).blocks); }

void resq_pack(const Problem* p) {
  const GemmPlan plan = plan_of(*p);
  std::memcpy(p->packed, plan.runs.data(), plan.runs.size() * sizeof(GemmRun));
  uint8_t* tiles = p->packed + table_bytes(p->n_runs);
  const PartWeights parts[2] = {{p->low, p->low_row_bytes, p->low_bits == 4}, {p->high, p->high_row_bytes, false}};
  for (int64_t tile = 0; tile < weight_tiles(p->n); ++tile)
    for (size_t r = 0; r < plan.runs.size(); ++r)
      for (int32_t b = plan.runs[r].first_block; b < plan.runs[r].first_block + plan.runs[r].blocks; ++b)
        for (int byte = 0; byte < kBlockBytes; ++byte)
          tiles[(tile * plan.blocks + b) * kBlockBytes + byte] =
              packed_byte(parts[plan.runs[r].part], plan.runs[r], plan.start[r], p->n, tile, b, byte);
}

// 0, or 1 when no kernel has this name.
int resq_gemm(const char* name, Problem* p) {
  const GemmPlan plan = plan_of(*p);
  GemmArgs a{};
  a.codes = p->codes, a.pitch = p->pitch;
  a.part_at[0] = static_cast<int32_t>(p->part_at[0]), a.part_at[1] = static_cast<int32_t>(p->part_at[1]);
  a.groups = static_cast<int32_t>(p->groups), a.x_scale = p->x_scale, a.x_zero = p->x_zero;
  a.runs = reinterpret_cast<const GemmRun*>(p->packed), a.weight = p->packed + table_bytes(p->n_runs);
  a.n_runs = static_cast<int32_t>(p->n_runs), a.blocks = plan.blocks;
  a.weight_scale = p->weight_scale, a.weight_sum = p->weight_sum, a.bias = p->bias, a.out = p->out;
  a.bias_type = static_cast<Float>(p->bias_type), a.out_type = static_cast<Float>(p->out_type);
  a.m = static_cast<int32_t>(p->m), a.n = static_cast<int32_t>(p->n);
  a.raw_run = static_cast<int32_t>(p->raw_run), a.splits = static_cast<int32_t>(p->splits);
  emulator::buffers.clear();
  const size_t m = p->m, n = p->n;
  expose(p->codes, m * p->pitch);
  expose(p->x_scale, m * p->groups * 4);
  expose(p->x_zero, m * p->groups * 4);
  expose(p->packed, resq_packed_bytes(p), true);
  expose(p->weight_scale, p->scale_rows * n * 4, true);
  expose(p->weight_sum, p->n_runs * n * 4, true);
  expose(p->bias, n * float_bytes(p->bias_type), true);
  expose(p->out, m * n * float_bytes(p->out_type));
  const auto tiles = [](int64_t count, int tile) { return static_cast<int>((count + tile - 1) / tile); };
  const std::string wanted = name;
#define RESQ_RUN_DECODE(NAME, ...)                                                                               \
  if (wanted == #NAME) {                                                                                         \
    using S = __VA_ARGS__;                                                                                       \
    emulator::require(p->m <= S::kTokens, "too many tokens for this kernel");                                    \
    launch<S>(a, *p, S::kQuads, tiles(p->n, S::kChannels), 1, [](const GemmArgs& g) { decode_gemm<S>(g); });     \
    return 0;                                                                                                    \
  }
#define RESQ_RUN_TILED(NAME, ...)                                                                              \
  if (wanted == #NAME) {                                                                                       \
    using S = __VA_ARGS__;                                                                                     \
    emulator::require(S::kSplit || p->splits == 1, "this kernel does not split");                              \
    launch<S>(a, *p, S::kTiles * S::kTokens8 * S::kThreads, tiles(p->n, S::kChannels), tiles(p->m, S::kTokens), \
              [](const GemmArgs& g) { tiled_gemm<S>(g); });                                                    \
    return 0;                                                                                                  \
  }
#define RESQ_RUN_WGMMA(NAME, ...)                                                                                    \
  if (wanted == #NAME) {                                                                                             \
    using S = __VA_ARGS__;                                                                                           \
    const TensorMap map{p->codes, p->pitch, p->m, p->pitch, S::kColumnBytes, S::kTokens};                            \
    p->conflicts = emulator::launch(static_cast<int>(p->grid), 1, S::kThreads, S::kSharedBytes,                      \
                                    static_cast<uint32_t>(p->seed), [&] {                                            \
                                      wgmma_gemm<S>(a, &map);                                                        \
                                      emulator::require_waited();                                                    \
                                    });                                                                              \
    return 0;                                                                                                        \
  }
  RESQ_DECODE_KERNELS(RESQ_RUN_DECODE)
  RESQ_TILED_KERNELS(RESQ_RUN_TILED)
  RESQ_INT4_KERNELS(RESQ_RUN_TILED)
  RESQ_WGMMA_KERNELS(RESQ_RUN_WGMMA)
  return 1;
}

// --- index maths ----------------------------------------------------------------------------------------------------------
int resq_weight_byte(int channel, int column, int nibbles, int* shift) {
  const WeightPlace place = weight_place(channel, column, nibbles != 0);
  *shift = place.shift;
  return place.byte;
}
int resq_split_begin(int blocks, int splits, int split) { return split_range(blocks, splits, split).begin; }
int resq_split_end(int blocks, int splits, int split) { return split_range(blocks, splits, split).end; }
int resq_split_of(int blocks, int splits, int block) { return split_of(blocks, splits, block); }
int resq_tile_channel(int index, int channels, int tokens) { return tile_place(index, channels, tokens).channel; }
int resq_tile_token(int index, int channels, int tokens) { return tile_place(index, channels, tokens).token; }
int resq_chunk_offset(int row, int chunk) { return static_cast<int>(chunk_offset(row, chunk)); }


// --- the table of kernels -------------------------------------------------------------------------------------------------
const char* resq_kernel_name(int index) { return index < kKernelCount ? kKernels[index].name : nullptr; }

// The shape of a kernel's name as gemm_kernels.h writes it, its threads and what the table says: CTAs that its launch
// bounds leave registers for, and those that a chip with `shared` bytes a processor holds.
const char* resq_kernel_shape(int index, int shared, int* facts) {
  const KernelInfo& k = kKernels[index];
  const std::string wanted = k.name;
  facts[1] = k.ctas, facts[2] = resident(k, Chip{0, 1, shared, false, false});
#define RESQ_SHAPE(NAME, ...)                                                                          \
  if (wanted == #NAME) {                                                                               \
    emulator::require(__VA_ARGS__::kCtas == k.ctas && __VA_ARGS__::kSharedBytes == k.shared,            \
                      "the table and the shape disagree about " #NAME);                                \
    facts[0] = __VA_ARGS__::kThreads;                                                                  \
    return #__VA_ARGS__;                                                                               \
  }
  RESQ_DECODE_KERNELS(RESQ_SHAPE)
  RESQ_TILED_KERNELS(RESQ_SHAPE)
  RESQ_INT4_KERNELS(RESQ_SHAPE)
  RESQ_WGMMA_KERNELS(RESQ_SHAPE)
  return nullptr;
}

// The choice for a chip; what it says of the kernel: tokens, channels, whole, split, bytes of partial sums.
int resq_choose(int arch, int processors, int shared, int wgmma, int int4, int64_t m, int64_t n, int blocks, int runs,
                int four_bits, int* splits, int64_t* facts) {
  const Chip chip{arch, processors, shared, wgmma != 0, int4 != 0};
  const Choice choice = choose_kernel(chip, m, n, blocks, runs, four_bits != 0);
  const KernelInfo& k = kKernels[choice.kernel];
  *splits = choice.splits;
  facts[0] = k.tokens, facts[1] = k.channels, facts[2] = k.whole, facts[3] = k.split;
  facts[4] = choice.splits > 1 ? partial_bytes(k, m, n, choice.splits, runs) : 0;
  facts[5] = tiles_of(k, m, n);
  return choice.kernel;
}

}  // extern "C"
