// The executable plan of a linear layer: flat segments -> runs, padded activation rows, superblock offsets.
//
// Mirrors resq_vllm/formats/plan.py: a run is a stretch of one part whose segments follow each other there and share an
// activation group, cut at the boundaries of the low part's weight groups; runs are in the order of their first segment.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace resq {

struct LinearPlan {
  std::vector<SegmentPlace> segments;
  std::vector<RunPlace> runs;
  std::vector<int32_t> group_bits, block_segments, block_groups, group_list;
  int64_t columns = 0, padded_columns = 0, superblock_bytes = 0;
  int64_t part_columns[2] = {0, 0};
  int64_t hadamard_groups = 0;
  int64_t scale_rows = 2;  // rows of the weight scales: the low part's, then the high part's

  // The view points into this object.
  PlanView view() const;
};

// `segments`: columns, part, group triples; `weight_group`: columns of the low part that share a weight scale, 0 = all.
// Throws std::runtime_error with one sentence when they are malformed.
LinearPlan make_plan(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits, int low_bits,
                     int64_t hadamard_groups, int64_t weight_group);

// A plan's arguments in one row of numbers: hadamard_groups, weight_group, how many numbers the segments have, these,
// and group_bits.
std::vector<int64_t> plan_words(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits,
                                int64_t hadamard_groups, int64_t weight_group);

// make_plan's result for `count` words from the calling thread's cache, so that a decode step builds none. The cache is
// bounded; a model has a handful of plans.
std::shared_ptr<const LinearPlan> cached_plan(const int64_t* words, int64_t count, int low_bits);

}  // namespace resq
