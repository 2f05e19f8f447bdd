// torch.ops.resq.pack_weight, linear, linear_quantized and cuda_kernel on CUDA tensors. Nothing but pack_weight waits for
// the device or allocates outside of torch's allocator, so all of the others can be captured.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>

#include "gemm_launch.h"
#include "gemm_plan.h"
#include "op_quantize.h"
#include "plan.h"
#include "torch_checks.h"

namespace resq::cuda {
namespace {

using Ints = std::vector<int64_t>;

// --- what a device needs beside the tensors of a call -------------------------------------------------------------------
// Partial sums of tiles that several CTAs share, and the counters of their arrivals. One a device: GEMMs of one device run
// one after another on one stream, as vLLM's do.
struct Workspace {
  Tensor partial, arrived;
};

void clear_arrivals(const Workspace& space, const OnDevice& device, const char* op) {
  check_launch(clear(space.arrived.mutable_data_ptr(), kMaxTiles * sizeof(uint32_t), device.stream()), op);
}

const Workspace& workspace(const Tensor& like, const OnDevice& device) {
  static std::array<std::unique_ptr<Workspace>, 64> all;
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  auto& mine = all[static_cast<size_t>(like.get_device_index()) & 63];
  if (!mine) {
    mine = std::make_unique<Workspace>(Workspace{torch::stable::new_empty(like, {kPartialBytes}, ScalarType::Byte),
                                                 torch::stable::new_empty(like, {kMaxTiles}, ScalarType::Int)});
    clear_arrivals(*mine, device, "linear");
  }
  return *mine;
}

Chip chip_of(int device) {
  Chip chip{};
  if (const char* error = current_chip(device, chip))
    throw std::runtime_error("linear: CUDA device " + std::to_string(device) + " does not say what it is (" + error + ")");
  static const bool hopper_code = std::string(RESQ_CUDA_ARCHS).find("sm_90a") != std::string::npos;
  static const bool int4_code = std::string(RESQ_CUDA_ARCHS).find("sm_8") != std::string::npos;
  chip.wgmma = chip.arch == 90 && hopper_code;
  chip.int4 = chip.arch < 90 && int4_code;
  if (chip.arch < 80)
    check(false, "linear: this GPU has compute capability " + std::to_string(chip.arch / 10) + "." +
                     std::to_string(chip.arch % 10) + ", but the integer tensor-core kernels need 8.0 or later");
  return chip;
}

// --- plans ----------------------------------------------------------------------------------------------------------------
struct LinearLayout {
  Ints segments, group_bits;
  int64_t weight_group;
  int low_bits;
  ActivationPlan activations;
  GemmPlan gemm;
  bool four_bits;  // all codes of the low part are 0..15
};

LinearLayout make_layout(const Ints& segments, const Ints& group_bits, int64_t weight_group, int low_bits) {
  LinearLayout layout{segments, group_bits, weight_group, low_bits,
                      make_activation_plan(segments, group_bits, weight_group, false), {}, true};
  layout.gemm = make_gemm_plan(layout.activations.runs, low_bits);
  for (const RunSpan& run : layout.activations.runs)
    layout.four_bits = layout.four_bits && (run.part == 1 || group_bits[static_cast<size_t>(run.group)] == 4);
  return layout;
}

// From the calling thread's cache: a decode step builds none. A model has a handful.
const LinearLayout& cached_layout(const Ints& segments, const Ints& group_bits, int64_t weight_group, int low_bits) {
  static thread_local std::vector<std::unique_ptr<LinearLayout>> cache;
  static thread_local size_t oldest = 0;
  constexpr size_t kMost = 64;
  for (const auto& known : cache)
    if (known->low_bits == low_bits && known->weight_group == weight_group && known->group_bits == group_bits &&
        known->segments == segments)
      return *known;
  auto made = std::make_unique<LinearLayout>(make_layout(segments, group_bits, weight_group, low_bits));
  if (cache.size() < kMost) {
    cache.push_back(std::move(made));
    return *cache.back();
  }
  const size_t place = oldest;
  oldest = (oldest + 1) % kMost;
  cache[place] = std::move(made);
  return *cache[place];
}

// The width of the low weights is not an argument, but it shows in the size of the packed weight.
const LinearLayout& layout_of_packed(const Tensor& packed, int64_t n, const Ints& segments, const Ints& group_bits,
                                     int64_t weight_group) {
  int64_t expected[2];
  for (const int low_bits : {4, 8}) {
    const LinearLayout& layout = cached_layout(segments, group_bits, weight_group, low_bits);
    expected[low_bits / 8] = packed_bytes(static_cast<int64_t>(layout.gemm.runs.size()), n, layout.gemm.blocks);
    if (packed.numel() == expected[low_bits / 8]) return layout;
  }
  throw std::runtime_error("packed holds " + std::to_string(packed.numel()) + " bytes, but these segments and n = " +
                           std::to_string(n) + " need " + std::to_string(expected[0]) + " (or " +
                           std::to_string(expected[1]) + " at 8 bit); pack the weight on this device with the same "
                           "arguments");
}

Float float_type(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Float::f32;
    case ScalarType::Half: return Float::f16;
    case ScalarType::BFloat16: return Float::bf16;
    default: throw std::runtime_error(std::string(name) + " must be float32, float16 or bfloat16");
  }
}

void check_operand(const Tensor& t, const Tensor& like, ScalarType dtype, const char* name, const char* words) {
  check_dtype(t, dtype, name, words);
  check_contiguous(t, name);
  check_device(t, like, name);
}

// The named kernel ("" = the table's choice) and its splits (0 = the table's).
Choice choose(const Chip& chip, int64_t m, int64_t n, const LinearLayout& layout, const std::string& kernel,
              int64_t splits) {
  const GemmPlan& plan = layout.gemm;
  const int32_t runs = static_cast<int32_t>(plan.runs.size());
  if (kernel.empty()) return choose_kernel(chip, m, n, plan.blocks, runs, layout.four_bits);
  for (int32_t i = 0; i < kKernelCount; ++i) {
    const KernelInfo& k = kKernels[i];
    if (kernel != k.name) continue;
    check(k.family != Family::wgmma || chip.wgmma, "this kernel runs only on Hopper GPUs, in a build for sm_90a");
    check(k.family != Family::int4 || (chip.int4 && layout.four_bits),
          "this kernel runs only on GPUs of compute capability 8.x, on 4-bit activations");
    check(k.family != Family::decode || m <= k.tokens, "this kernel does not hold so many tokens");
    const int64_t used = splits ? splits : choose_splits(k, chip, m, n, plan.blocks, runs);
    check(used == 1 || k.split, "this kernel does not split");
    check(used >= 1 && used <= kMaxSplits && used <= plan.blocks, "a tile has 1 to 8 splits, and no more than blocks");
    check((used == 1 && k.whole) || (tiles_of(k, m, n) <= kMaxTiles &&
                                     partial_bytes(k, m, n, static_cast<int32_t>(used), runs) <= kPartialBytes),
          "this kernel's partial sums do not fit the workspace with so many tiles and splits");
    return {i, static_cast<int32_t>(used)};
  }
  throw std::runtime_error("there is no CUDA kernel named " + kernel);
}

}  // namespace

std::tuple<Tensor, Tensor> pack_weight(const std::optional<Tensor>& low, const std::optional<Tensor>& high,
                                       int64_t low_bits, int64_t n, Ints segments, int64_t weight_group) {
  check(low || high, "pack_weight needs at least one of low and high");
  check(low_bits == 4 || low_bits == 8, "low_bits must be 4 or 8, not " + std::to_string(low_bits));
  check(n > 0 && n < (int64_t{1} << 31), "n must be positive and fit 32 bits");
  int64_t groups = 0;
  for (size_t i = 2; i < segments.size(); i += 3) groups = std::max(groups, segments[i] + 1);
  const LinearLayout layout =
      make_layout(segments, Ints(static_cast<size_t>(groups), 8), weight_group, static_cast<int>(low_bits));
  int64_t columns[2] = {0, 0};
  for (const RunSpan& run : layout.activations.runs) columns[run.part] += run.length;
  check((columns[0] > 0) == low.has_value(), "low must be given exactly when the segments have low columns");
  check((columns[1] > 0) == high.has_value(), "high must be given exactly when the segments have high columns");
  const Tensor& like = low ? *low : *high;
  PartWeights parts[2] = {{nullptr, 0, low_bits == 4}, {nullptr, columns[1], false}};
  if (low) {
    check(low_bits == 8 || columns[0] % 2 == 0, "4-bit weights need an even number of low columns");
    check_operand(*low, like, low_bits == 4 ? ScalarType::Byte : ScalarType::Char, "low",
                  low_bits == 4 ? "uint8 (two 4-bit weights a byte)" : "int8");
    parts[0].row_bytes = low_bits == 4 ? columns[0] / 2 : columns[0];
    check_shape(*low, {n, parts[0].row_bytes}, "low");
    parts[0].data = static_cast<const uint8_t*>(low->const_data_ptr());
  }
  if (high) {
    check_operand(*high, like, ScalarType::Char, "high", "int8");
    check_shape(*high, {n, columns[1]}, "high");
    parts[1].data = static_cast<const uint8_t*>(high->const_data_ptr());
  }
  const OnDevice device(like);
  const int64_t runs = static_cast<int64_t>(layout.gemm.runs.size());
  Tensor packed = torch::stable::new_empty(like, {packed_bytes(runs, n, layout.gemm.blocks)}, ScalarType::Byte);
  Tensor sums = torch::stable::new_empty(like, {runs, n}, ScalarType::Int);
  // Now, not while a graph is captured. The counters with every weight: where the pool that the workspace lies in was
  // discarded (vLLM's sleep level 2), new weights come before the next GEMM.
  clear_arrivals(workspace(like, device), device, "pack_weight");
  check_launch(launch_pack(parts, layout.gemm.runs.data(), layout.gemm.start.data(), static_cast<int32_t>(runs),
                           layout.gemm.blocks, n, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                           static_cast<int32_t*>(sums.mutable_data_ptr()), device.stream()),
               "pack_weight");
  return {packed, sums};
}

// codes, scale, zero: what quantize_pack and its kin return for the same plan. raw_run >= 0: the exact integers of that run
// as int32 bits in a float32 result. kernel, splits: see choose().
Tensor linear_quantized(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& packed,
                        const Tensor& scales, const Tensor& wsum, const std::optional<Tensor>& bias, int64_t n,
                        Ints segments, Ints group_bits, int64_t weight_group, ScalarType dtype, int64_t raw_run,
                        std::string kernel, int64_t splits) {
  check(n > 0 && n < (int64_t{1} << 31), "n must be positive and fit 32 bits");
  check(codes.dim() == 2 && codes.size(0) < (int64_t{1} << 31), "codes must have shape [M, row bytes]");
  check_operand(packed, codes, ScalarType::Byte, "packed", "uint8");
  check_operand(codes, codes, ScalarType::Byte, "codes", "uint8");
  check_operand(scale, codes, ScalarType::Float, "scale", "float32");
  check_operand(zero, codes, ScalarType::Int, "zero", "int32");
  check_operand(scales, codes, ScalarType::Float, "scales", "float32");
  check_operand(wsum, codes, ScalarType::Int, "wsum", "int32");
  const LinearLayout& layout = layout_of_packed(packed, n, segments, group_bits, weight_group);
  const int64_t m = codes.size(0), groups = static_cast<int64_t>(group_bits.size());
  const int64_t runs = static_cast<int64_t>(layout.gemm.runs.size());
  check_shape(codes, {m, layout.activations.row_bytes}, "codes");
  check_shape(scale, {m, groups}, "scale");
  check_shape(zero, {m, groups}, "zero");
  check_shape(scales, {layout.activations.scale_rows, n}, "scales");
  check_shape(wsum, {runs, n}, "wsum");
  check(raw_run < runs && (raw_run < 0 || (dtype == ScalarType::Float && !bias)),
        "raw_run must be a run, with a float32 result and without bias");

  const OnDevice device(codes);
  Tensor out = torch::stable::new_empty(codes, {m, n}, dtype);
  GemmArgs a{};
  a.out_type = float_type(dtype, "dtype");
  if (bias) {
    check_shape(*bias, {n}, "bias");
    check_contiguous(*bias, "bias");
    check_device(*bias, codes, "bias");
    a.bias = bias->const_data_ptr();
    a.bias_type = float_type(bias->scalar_type(), "bias");
  }
  if (m == 0) return out;
  const Chip chip = chip_of(codes.get_device_index());
  const Choice choice = choose(chip, m, n, layout, kernel, splits);
  a.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  a.pitch = layout.activations.row_bytes;
  a.part_at[1] = static_cast<int32_t>(layout.activations.pitch[0]);
  a.groups = static_cast<int32_t>(groups);
  a.x_scale = static_cast<const float*>(scale.const_data_ptr());
  a.x_zero = static_cast<const int32_t*>(zero.const_data_ptr());
  const uint8_t* base = static_cast<const uint8_t*>(packed.const_data_ptr());
  check(reinterpret_cast<uintptr_t>(base) % 16 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 16 == 0,
        "packed and codes must begin at a multiple of 16 bytes");
  a.runs = reinterpret_cast<const GemmRun*>(base);
  a.weight = base + table_bytes(runs);
  a.n_runs = static_cast<int32_t>(runs);
  a.blocks = layout.gemm.blocks;
  a.weight_scale = static_cast<const float*>(scales.const_data_ptr());
  a.weight_sum = static_cast<const int32_t*>(wsum.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.m = static_cast<int32_t>(m);
  a.n = static_cast<int32_t>(n);
  a.raw_run = static_cast<int32_t>(raw_run);
  a.splits = choice.splits;
  if (kKernels[choice.kernel].split) {
    const Workspace& shared = workspace(codes, device);
    a.partial = static_cast<int32_t*>(shared.partial.mutable_data_ptr());
    a.arrived = static_cast<uint32_t*>(shared.arrived.mutable_data_ptr());
  }
  check_launch(launch_gemm(choice, chip, a, device.stream()), kKernels[choice.kernel].name);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& wsum,
              const std::optional<Tensor>& bias, int64_t n, Ints segments, Ints group_bits, int64_t hadamard_groups,
              const std::optional<Tensor>& hadamard_k, int64_t weight_group) {
  check(x.dim() > 0 && n > 0, "linear needs x [..., K] and a positive n");
  const Tensor rows = x.dim() == 2 ? x : torch::stable::reshape(x, {-1, x.size(x.dim() - 1)});
  const auto [codes, scale, zero] =
      quantize_pack(rows, segments, group_bits, hadamard_groups, hadamard_k, weight_group, false);
  Tensor y = linear_quantized(codes, scale, zero, packed, scales, wsum, bias, n, segments, group_bits, weight_group,
                              x.scalar_type(), -1, "", 0);
  if (x.dim() == 2) return y;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  return torch::stable::reshape(y, shape);
}

// Which kernel m tokens and these weights get on device `device`, for the log: "decode_m8_n32 x2".
std::string cuda_kernel(int64_t device, int64_t m, int64_t n, Ints segments, Ints group_bits, int64_t low_bits,
                        int64_t weight_group) {
  const LinearLayout& layout = cached_layout(segments, group_bits, weight_group, static_cast<int>(low_bits));
  return kernel_name(choose(chip_of(static_cast<int>(device)), m, n, layout, "", 0));
}

STABLE_TORCH_LIBRARY_IMPL(resq, CUDA, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_quantized", TORCH_BOX(&linear_quantized));
}

STABLE_TORCH_LIBRARY_IMPL(resq, CompositeExplicitAutograd, m) { m.impl("cuda_kernel", TORCH_BOX(&cuda_kernel)); }

}  // namespace resq::cuda
