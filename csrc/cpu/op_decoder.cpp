// torch.ops.resq.decoder_stack, run_decoder_stack and drop_decoder_stack: a whole stack of decoder layers, attention
// included, in one call, checked once. Between two ops of a decode step, Python, torch's dispatcher and its allocator find
// the caches full of weights: 0.3 to 0.4 ms a layer on 2 cores (Zen 4, 1B shape), a fifth of a step. And to pass a stack's
// 288 tensors to an op and to free their handles takes 0.4 ms a call.
#include <map>
#include <memory>
#include <mutex>

#include "../ops.h"
#include "decoder_stack.h"

namespace resq {
namespace {

// Stacks by number.
struct Stacks {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<DecoderStack>> all;
  int64_t last = 0;

  static Stacks& kept() {
    static Stacks stacks;
    return stacks;
  }
};

}  // namespace

int64_t decoder_stack(const Tensor& cos_sin_cache, std::vector<std::optional<Tensor>> weights,
                      std::vector<double> epsilons, std::vector<Tensor> kv_caches,
                      std::vector<std::optional<Tensor>> rotations, std::vector<double> scales,
                      std::vector<int64_t> layouts, int64_t query_heads) {
  auto made = std::make_shared<DecoderStack>(
      StackTensors{cos_sin_cache, std::move(weights), std::move(kv_caches), std::move(rotations)},
      std::move(epsilons), std::move(scales), std::move(layouts), query_heads);
  Stacks& stacks = Stacks::kept();
  const std::lock_guard lock(stacks.mutex);
  stacks.all.emplace(++stacks.last, std::move(made));
  return stacks.last;
}

std::tuple<Tensor, Tensor> run_decoder_stack(int64_t stack, const Tensor& qkv, const Tensor& residual,
                                             const Tensor& positions, const Tensor& slot_mapping,
                                             const Tensor& block_table, const Tensor& seq_lens,
                                             const Tensor& query_start_loc) {
  std::shared_ptr<DecoderStack> found;
  {
    Stacks& stacks = Stacks::kept();
    const std::lock_guard lock(stacks.mutex);
    const auto at = stacks.all.find(stack);
    check(at != stacks.all.end(), [&] { return "there is no decoder stack " + std::to_string(stack); });
    found = at->second;
  }
  return found->run(qkv, residual, positions, slots_of(slot_mapping),
                    sequences_of(block_table, seq_lens, query_start_loc));
}

void drop_decoder_stack(int64_t stack) {
  std::shared_ptr<DecoderStack> dropped;  // destroyed after the lock is given up
  Stacks& stacks = Stacks::kept();
  const std::lock_guard lock(stacks.mutex);
  const auto at = stacks.all.find(stack);
  if (at == stacks.all.end()) return;
  dropped = std::move(at->second);
  stacks.all.erase(at);
}

}  // namespace resq
