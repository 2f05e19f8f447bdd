#include "plan.h"

#include "../cpu/plan.h"

namespace resq::cuda {
namespace {

// Whether `next` goes on where `span` ends, in x as in the row.
bool follows(const ColumnSpan& span, const ColumnSpan& next) {
  return span.group == next.group && span.column + span.columns == next.column && span.at + span.columns == next.at;
}

}  // namespace

ActivationPlan make_activation_plan(const std::vector<int64_t>& segments, const std::vector<int64_t>& group_bits,
                                    int64_t weight_group, bool nibbles) {
  // The runs do not depend on the width of the weights nor on the Hadamard transform.
  const LinearPlan base = make_plan(segments, group_bits, 4, 0, weight_group);
  ActivationPlan plan;
  plan.columns = base.columns;
  plan.scale_rows = base.scale_rows;
  plan.group_bits = base.group_bits;
  bool four_bits = nibbles;
  for (const RunPlace& run : base.runs) {
    const int64_t padded = padded_columns(run.length);
    plan.runs.push_back({run.part, run.group, run.scale_row, 0, static_cast<int32_t>(run.length),
                         static_cast<int32_t>(padded)});
    if (run.part == 0) four_bits = four_bits && base.group_bits[run.group] == 4;
  }
  if (four_bits) plan.store[0] = Store::u4;
  // Runs of one part follow each other in the order of the list.
  int64_t* used = plan.used;
  for (RunSpan& run : plan.runs) {
    run.at = static_cast<int32_t>(used[run.part]);
    used[run.part] += run.padded;
  }
  for (int part = 0; part < 2; ++part) {
    plan.pitch[part] = part_pitch(used[part], plan.store[part]);
    plan.padded[part] = plan.store[part] == Store::u4 ? plan.pitch[part] * 2 : plan.pitch[part];
  }
  plan.row_bytes = plan.pitch[0] + plan.pitch[1];
  for (const SegmentPlace& s : base.segments) {
    const RunSpan& run = plan.runs[s.run];
    const int64_t at = (run.part ? plan.padded[0] : 0) + run.at + (s.at - base.runs[s.run].activation_at);
    const ColumnSpan span{static_cast<int32_t>(s.column), static_cast<int32_t>(s.columns), s.group,
                          static_cast<int32_t>(at)};
    if (!plan.spans.empty() && follows(plan.spans.back(), span))
      plan.spans.back().columns += span.columns;
    else
      plan.spans.push_back(span);
  }
  return plan;
}

}  // namespace resq::cuda
