#include "plan.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace resq {
namespace {

constexpr int64_t kRunMultiple = 8;  // columns: one 32-bit word of nibbles per output
constexpr int64_t kRunAlignment = 64; // bytes of a run's activations: rows of AMX tiles, which are read whole

void check(bool ok, const std::string& sentence) {
  if (!ok) throw std::runtime_error(sentence);
}

void make_runs(LinearPlan& plan, const std::vector<int64_t>& flat, int low_bits, int64_t weight_group) {
  int64_t last[2] = {-1, -1};
  for (size_t i = 0; i < flat.size(); i += 3) {
    const int64_t columns = flat[i], part = flat[i + 1], group = flat[i + 2];
    check(columns > 0, "segments: a segment has " + std::to_string(columns) + " columns; leave empty segments out");
    check(part == 0 || part == 1, "segments: part must be 0 (low) or 1 (high), not " + std::to_string(part));
    check(group >= 0 && group < static_cast<int64_t>(plan.group_bits.size()),
          "segments: activation group " + std::to_string(group) + " has no entry in group_bits");
    const int64_t cut = part == 0 ? weight_group : 0;
    for (int64_t left = columns; left > 0;) {
      const int64_t start = plan.part_columns[part];
      const int64_t width = cut ? std::min(left, cut - start % cut) : left;
      if (last[part] < 0 || plan.runs[last[part]].group != group || (cut && start % cut == 0)) {
        last[part] = static_cast<int64_t>(plan.runs.size());
        RunPlace run{};
        run.part = static_cast<int32_t>(part);
        run.group = static_cast<int32_t>(group);
        run.nibbles = part == 0 && low_bits == 4;
        run.start = start;
        run.scale_row = static_cast<int32_t>(cut ? start / cut : 0);
        plan.runs.push_back(run);
      }
      RunPlace& run = plan.runs[last[part]];
      // `at` is relative to the run until the runs' lengths are known.
      plan.segments.push_back({plan.columns, width, run.length, 0, run.group, static_cast<int32_t>(last[part])});
      run.length += width;
      plan.part_columns[part] += width;
      plan.columns += width;
      left -= width;
    }
  }
  check(!weight_group || (plan.part_columns[0] > 0 && plan.part_columns[0] % weight_group == 0),
        "weight_group = " + std::to_string(weight_group) + " does not divide " + std::to_string(plan.part_columns[0]) +
            " low columns");
  plan.scale_rows = (weight_group ? plan.part_columns[0] / weight_group : 1) + 1;
  for (RunPlace& run : plan.runs)
    if (run.part == 1) run.scale_row = static_cast<int32_t>(plan.scale_rows - 1);
}

void place_runs(LinearPlan& plan) {
  for (RunPlace& run : plan.runs) {
    run.padded = (run.length + kRunMultiple - 1) / kRunMultiple * kRunMultiple;
    run.activation_at = plan.padded_columns;
    run.weight_at = plan.superblock_bytes;
    plan.padded_columns += (run.padded + kRunAlignment - 1) / kRunAlignment * kRunAlignment;
    plan.superblock_bytes += kSuperblock * run.padded / (run.nibbles ? 2 : 1);
  }
  for (SegmentPlace& s : plan.segments) {
    const RunPlace& run = plan.runs[s.run];
    if (s.at + s.columns == run.length) s.pad = run.padded - run.length;
    s.at += run.activation_at;
  }
}

// Whether every segment and every activation group lies within one of `blocks` equal stretches of columns.
bool groups_fit(const LinearPlan& plan, int64_t blocks) {
  const int64_t width = plan.columns / blocks;
  std::vector<int64_t> home(plan.group_bits.size(), -1);
  for (const SegmentPlace& s : plan.segments) {
    const int64_t block = s.column / width;
    if ((s.column + s.columns - 1) / width != block || (home[s.group] >= 0 && home[s.group] != block)) return false;
    home[s.group] = block;
  }
  return true;
}

// As many blocks of whole Hadamard blocks as leave every activation group within one of them.
void place_blocks(LinearPlan& plan, int64_t hadamard_groups) {
  int64_t blocks = hadamard_groups > 1 ? hadamard_groups : 1;
  while (blocks > 1 && (hadamard_groups % blocks || !groups_fit(plan, blocks))) --blocks;
  plan.block_segments.assign(blocks + 1, 0);
  plan.block_groups.assign(blocks + 1, 0);
  std::vector<bool> listed(plan.group_bits.size(), false);
  size_t next = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = (block + 1) * (plan.columns / blocks);
    for (; next < plan.segments.size() && plan.segments[next].column < end; ++next) {
      const int32_t group = plan.segments[next].group;
      if (!listed[group]) plan.group_list.push_back(group);
      listed[group] = true;
    }
    plan.block_segments[block + 1] = static_cast<int32_t>(next);
    plan.block_groups[block + 1] = static_cast<int32_t>(plan.group_list.size());
  }
}

}  // namespace

LinearPlan make_plan(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits, int low_bits,
                     int64_t hadamard_groups, int64_t weight_group) {
  check(!segments.empty() && segments.size() % 3 == 0,
        "segments must be a list of (columns, part, group) triples, but it has " + std::to_string(segments.size()) +
            " numbers");
  LinearPlan plan;
  for (int64_t bits : group_bits) {
    check(bits == 4 || bits == 8, "group_bits must be 4 or 8, not " + std::to_string(bits));
    plan.group_bits.push_back(static_cast<int32_t>(bits));
  }
  check(weight_group >= 0, "weight_group must not be negative, but is " + std::to_string(weight_group));
  plan.hadamard_groups = hadamard_groups;
  make_runs(plan, segments, low_bits, weight_group);
  check(hadamard_groups >= 0 && (hadamard_groups == 0 || plan.columns % hadamard_groups == 0),
        "hadamard_groups = " + std::to_string(hadamard_groups) + " does not divide " + std::to_string(plan.columns) +
            " input columns");
  place_runs(plan);
  place_blocks(plan, hadamard_groups);
  check(plan.group_list.size() == plan.group_bits.size(), "group_bits names an activation group that no segment uses");
  return plan;
}

namespace {

struct CachedPlan {
  std::vector<int64_t> words;
  int low_bits;
  std::shared_ptr<const LinearPlan> plan;

  bool is(const int64_t* other, int64_t count, int bits) const {
    return low_bits == bits && static_cast<int64_t>(words.size()) == count &&
           std::equal(words.begin(), words.end(), other);
  }
};

constexpr size_t kCachedPlans = 64;
constexpr int64_t kHeader = 3;

LinearPlan plan_of_words(const std::vector<int64_t>& words, int low_bits) {
  const int64_t count = static_cast<int64_t>(words.size()), segments = count < kHeader ? -1 : words[2];
  check(segments >= 0 && segments <= count - kHeader, "plan is not what plan_tensor makes");
  const auto at = words.begin() + kHeader;
  return make_plan({at, at + segments}, {at + segments, words.end()}, low_bits, words[0], words[1]);
}

}  // namespace

std::vector<int64_t> plan_words(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits,
                                int64_t hadamard_groups, int64_t weight_group) {
  std::vector<int64_t> words{hadamard_groups, weight_group, static_cast<int64_t>(segments.size())};
  words.reserve(words.size() + segments.size() + group_bits.size());
  words.insert(words.end(), segments.begin(), segments.end());
  words.insert(words.end(), group_bits.begin(), group_bits.end());
  return words;
}

std::shared_ptr<const LinearPlan> cached_plan(const int64_t* words, int64_t count, int low_bits) {
  static thread_local std::vector<CachedPlan> cache;
  static thread_local size_t oldest = 0;
  for (const CachedPlan& entry : cache)
    if (entry.is(words, count, low_bits)) return entry.plan;
  std::vector<int64_t> own(words, words + count);
  auto plan = std::make_shared<const LinearPlan>(plan_of_words(own, low_bits));
  CachedPlan made{std::move(own), low_bits, plan};
  if (cache.size() < kCachedPlans) {
    cache.push_back(std::move(made));
  } else {
    cache[oldest] = std::move(made);
    oldest = (oldest + 1) % kCachedPlans;
  }
  return plan;
}

PlanView LinearPlan::view() const {
  PlanView v{};
  v.segments = segments.data();
  v.runs = runs.data();
  v.group_bits = group_bits.data();
  v.block_segments = block_segments.data();
  v.block_groups = block_groups.data();
  v.group_list = group_list.data();
  v.n_runs = static_cast<int64_t>(runs.size());
  v.n_groups = static_cast<int64_t>(group_bits.size());
  v.blocks = static_cast<int64_t>(block_segments.size()) - 1;
  v.columns = columns;
  v.padded_columns = padded_columns;
  v.superblock_bytes = superblock_bytes;
  return v;
}

}  // namespace resq
