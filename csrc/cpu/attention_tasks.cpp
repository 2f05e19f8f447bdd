#include "attention_tasks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "isa.h"

namespace resq {
namespace {

constexpr int64_t kTileRows = 64;        // query rows (tokens x heads of a kv head) that share an unpacked tile
constexpr int64_t kTasksPerThread = 3;   // enough for the threads to even out
constexpr int64_t kShortestShare = 256;  // keys; shorter shares of a context cost more in merging than they gain

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Tasks are taken one by one, because their lengths differ.
template <class F>
void run_tasks(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

std::vector<AttentionTask> make_tasks(const AttentionArgs& args, const AttentionBatch& batch) {
  std::vector<AttentionTask> tasks;
  const int64_t tile = std::max<int64_t>(1, kTileRows / args.group);
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t first = batch.query_start_loc[s], queries = batch.query_start_loc[s + 1] - first;
    const int64_t start = batch.seq_lens[s] - queries;  // position of the first new token
    for (int64_t q = 0; q < queries; q += tile) {
      AttentionTask task{};
      task.sequence = s;
      task.query_row = first + q;
      task.queries = std::min(tile, queries - q);
      task.position = start + q;
      task.key_end = task.position + task.queries;
      if (args.window >= 0)
        task.key_begin = std::max<int64_t>(0, task.position - args.window + 1) / kTokenTile * kTokenTile;
      for (task.kv_head = 0; task.kv_head < batch.kv_heads; ++task.kv_head) tasks.push_back(task);
    }
  }
  return tasks;
}

}  // namespace

void run_attention(const AttentionArgs& args, const AttentionBatch& batch) {
  const Kernels& k = kernels();
  const std::vector<AttentionTask> tasks = make_tasks(args, batch);
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t wanted = kTasksPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t keys = 0;
  for (const AttentionTask& t : tasks) keys += t.key_end - t.key_begin;
  const int64_t share = std::max(kShortestShare, round_up(keys / std::max<int64_t>(wanted, 1), kTokenTile));
  const bool splits = count < wanted && std::any_of(tasks.begin(), tasks.end(), [&](const AttentionTask& t) {
                        return t.key_end - t.key_begin > share;
                      });
  if (!splits) {
    run_tasks(count, [&](int64_t i) { k.attention(args, tasks[i]); });
    return;
  }

  // Few tasks and long contexts: cut the contexts. The cuts follow the number of threads, so the last bits of the
  // result may differ between machines; they never differ between runs.
  std::vector<AttentionTask> shares;
  std::vector<int64_t> first_share;
  int64_t rows = 0;
  for (const AttentionTask& task : tasks) {
    first_share.push_back(static_cast<int64_t>(shares.size()));
    for (int64_t key = task.key_begin; key < task.key_end; key += share) {
      shares.push_back(task);
      shares.back().key_begin = key;
      shares.back().key_end = std::min(task.key_end, key + share);
      rows += task.queries * args.group;
    }
  }
  first_share.push_back(static_cast<int64_t>(shares.size()));
  const int64_t width = attention_width(args.page);
  std::vector<float> partial(rows * (width + 2));
  float* at = partial.data();
  for (AttentionTask& task : shares) {
    const int64_t n = task.queries * args.group;
    task.partial_sum = at;
    task.partial_max = at + n * width;
    task.partial_denominator = task.partial_max + n;
    at = task.partial_denominator + n;
  }
  run_tasks(static_cast<int64_t>(shares.size()), [&](int64_t i) { k.attention(args, shares[i]); });
  run_tasks(count, [&](int64_t i) {
    k.attention_merge(args, {shares.data() + first_share[i], first_share[i + 1] - first_share[i]});
  });
}

}  // namespace resq
