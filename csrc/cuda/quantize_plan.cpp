#include "quantize_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace resq::cuda {
namespace {

void check(bool ok, const char* what, int64_t count, int64_t most) {
  if (!ok)
    throw std::runtime_error("the CUDA kernels quantize rows of at most " + std::to_string(most) + " " + what +
                             ", but this layer's have " + std::to_string(count));
}

struct Block {
  int64_t spans = 0;            // of block 0
  std::vector<int32_t> groups;  // of block 0, by first use
  std::vector<int64_t> steps;   // of those groups, from block to block
};

// Whether `blocks` equal stretches of columns have the same spans and groups of their own; fills `found`.
bool uniform(const ActivationPlan& plan, int64_t blocks, Block& found) {
  const int64_t width = plan.columns / blocks, count = static_cast<int64_t>(plan.spans.size()) / blocks;
  if (static_cast<int64_t>(plan.spans.size()) % blocks || plan.used[0] % blocks || plan.used[1] % blocks) return false;
  found = {};
  found.spans = count;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t group = plan.spans[i].group;
    if (std::find(found.groups.begin(), found.groups.end(), group) == found.groups.end()) {
      found.groups.push_back(group);
      found.steps.push_back(blocks > 1 ? plan.spans[count + i].group - group : 0);
    }
  }
  std::vector<int64_t> owner(plan.group_bits.size(), -1);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < count; ++i) {
      const ColumnSpan &first = plan.spans[i], &span = plan.spans[b * count + i];
      const int part = first.at >= plan.padded[0];
      const auto local = std::find(found.groups.begin(), found.groups.end(), first.group) - found.groups.begin();
      if (span.columns != first.columns || span.column != first.column + b * width || span.column + span.columns > (b + 1) * width)
        return false;
      if (span.at != first.at + b * (plan.used[part] / blocks)) return false;
      if (span.group != first.group + b * found.steps[local]) return false;
      if (plan.group_bits[span.group] != plan.group_bits[first.group]) return false;
      if (owner[span.group] >= 0 && owner[span.group] != b) return false;
      owner[span.group] = b;
    }
  return true;
}

void set_hadamard(QuantizeArgs& args, int64_t columns, int64_t groups, int64_t k) {
  // Without a transform, blocks of one column: no butterflies, and a root of 1.
  args.hadamard_n = static_cast<int32_t>(groups ? columns / groups : 1);
  args.hadamard_k = static_cast<int32_t>(groups ? k : 1);
  args.root = static_cast<float>(std::sqrt(static_cast<double>(args.hadamard_n)));
}

}  // namespace

QuantizeArgs make_quantize_args(const ActivationPlan& plan, int64_t hadamard_groups, int64_t hadamard_k, Order order) {
  check(plan.columns < kMaxColumns, "columns", plan.columns, kMaxColumns - 1);
  int64_t blocks = std::max<int64_t>(hadamard_groups, 1);
  Block block;
  while (blocks > 1 && (hadamard_groups % blocks || !uniform(plan, blocks, block))) --blocks;
  if (blocks == 1) uniform(plan, 1, block);
  const int64_t groups = static_cast<int64_t>(block.groups.size());
  check(block.spans <= kMaxSpans, "stretches of columns", block.spans, kMaxSpans);
  check(groups <= kMaxGroups, "activation scales", groups, kMaxGroups);

  QuantizeArgs args{};
  args.blocks = static_cast<int32_t>(blocks);
  args.columns = static_cast<int32_t>(plan.columns / blocks);
  set_hadamard(args, plan.columns, hadamard_groups, hadamard_k);
  args.scale_groups = static_cast<int32_t>(plan.group_bits.size());
  if (order == Order::columns) {
    args.part[0] = {0, args.columns, 0, args.columns, 0, Store::u8};
    args.row_bytes = plan.columns;
    args.codes_aligned = args.columns % 16 == 0;
  } else {
    args.row_bytes = plan.row_bytes;
    args.codes_aligned = 1;
    for (int part = 0; part < 2; ++part) {
      const int64_t codes = plan.used[part] / blocks;
      PartOut& out = args.part[part];
      out.staged = static_cast<int32_t>(part ? plan.used[0] / blocks : 0);
      out.codes = static_cast<int32_t>(codes);
      out.out = part ? plan.pitch[0] : 0;
      out.block_step = stored_bytes(codes, plan.store[part]);
      out.tail = static_cast<int32_t>(plan.pitch[part] - stored_bytes(plan.used[part], plan.store[part]));
      out.store = plan.store[part];
    }
  }
  args.staging = static_cast<int32_t>(round_up(args.part[0].codes + args.part[1].codes, 16));
  args.spans = static_cast<int32_t>(block.spans);
  args.groups = static_cast<int32_t>(groups);
  for (int64_t i = 0; i < block.spans; ++i) {
    const ColumnSpan& span = plan.spans[i];
    const int part = span.at >= plan.padded[0];
    const int64_t in_part = span.at - (part ? plan.padded[0] : 0);
    args.span[i].column = static_cast<uint32_t>(span.column);
    args.span[i].group = static_cast<uint32_t>(
        std::find(block.groups.begin(), block.groups.end(), span.group) - block.groups.begin());
    args.span[i].at = static_cast<uint32_t>(order == Order::columns ? span.column : args.part[part].staged + in_part);
  }
  args.span[block.spans].column = static_cast<uint32_t>(args.columns);
  for (int64_t g = 0; g < groups; ++g) {
    args.group[g].index = static_cast<uint32_t>(block.groups[g]);
    args.group[g].step = static_cast<uint32_t>(block.steps[g]);
    args.group[g].bits = static_cast<uint32_t>(plan.group_bits[block.groups[g]]);
  }
  return args;
}

QuantizeArgs make_hadamard_args(int64_t columns, int64_t hadamard_groups, int64_t hadamard_k) {
  check(columns < kMaxColumns, "columns", columns, kMaxColumns - 1);
  QuantizeArgs args{};
  args.blocks = static_cast<int32_t>(hadamard_groups);
  args.columns = static_cast<int32_t>(columns / hadamard_groups);
  set_hadamard(args, columns, hadamard_groups, hadamard_k);
  return args;
}

}  // namespace resq::cuda
