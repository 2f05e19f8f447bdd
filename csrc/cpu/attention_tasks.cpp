#include "attention_tasks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "attention_kernels.h"
#include "isa.h"

namespace resq {
namespace {

constexpr int64_t kTasksPerThread = 3;   // enough for the threads to even out
constexpr int64_t kShortestShare = 256;  // keys; shorter shares of a context cost more in merging than they gain
constexpr int64_t kDecodeRows = 16;      // query rows of a kv head up to which the decode kernel is the faster one
constexpr int64_t kFloatRows = 64;       // query rows (tokens x heads of a kv head) that share an unpacked tile
constexpr int64_t kPrefillRows = 256;
// Tokens of context a task should have over its kv heads: nothing hides a task's first chunk. 16 sequences of 2048 tokens
// took 3 to 7 % longer with 2048, a task for every head.
constexpr int64_t kTaskKeys = 16384;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Tasks are taken one by one, because their lengths differ.
template <class F>
void run_tasks(int64_t count, const F& f) {
  const int64_t workers = std::min<int64_t>(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

// The new token's k and v of the task's heads, unless another share of its context has it.
void write_token(const KVWriteArgs& all, const AttentionTask& task) {
  if (task.key_end <= task.position) return;
  const int64_t bytes = all.dtype == DType::f32 ? 4 : 2;
  KVWriteArgs own = all;
  own.key = static_cast<const uint8_t*>(all.key) + task.kv_head * all.key_head_stride * bytes;
  own.value = static_cast<const uint8_t*>(all.value) + task.kv_head * all.value_head_stride * bytes;
  own.cache = all.cache + task.kv_head * all.head_stride;
  own.heads = task.kv_heads;
  kernels().kv_write(own, task.query_row, task.query_row + 1);
}

// A task and the kernel that runs it.
struct Work {
  AttentionTask task;
  AttentionKernel kernel;
  int64_t keys() const { return task.key_end - task.key_begin; }
};

void make_work(const AttentionArgs& args, const AttentionBatch& batch, const AttentionPaths& paths,
               AttentionKernel plain, int64_t threads, std::vector<Work>& work) {
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t first = batch.query_start_loc[s], queries = batch.query_start_loc[s + 1] - first;
    if (queries == 0) continue;
    const int64_t start = batch.seq_lens[s] - queries;  // position of the first new token
    const bool decode = paths.decode && (queries == 1 || queries * args.group <= kDecodeRows);
    const AttentionKernel few = queries * args.group <= kNarrowRows ? paths.narrow_decode : paths.decode;
    const AttentionKernel kernel = decode ? few : paths.prefill ? paths.prefill : plain;
    const int64_t rows = decode ? queries * args.group : kernel == plain ? kFloatRows : kPrefillRows;
    const int64_t tile = std::max<int64_t>(1, rows / args.group);
    // The last tiles have the longest contexts: they go first, so that the threads end together.
    for (int64_t q = (queries - 1) / tile * tile; q >= 0; q -= tile) {
      AttentionTask task{};
      task.sequence = s;
      task.query_row = first + q;
      task.queries = std::min(tile, queries - q);
      task.position = start + q;
      task.key_end = task.position + task.queries;
      if (args.window >= 0)
        task.key_begin = std::max<int64_t>(0, task.position - args.window + 1) / kTokenTile * kTokenTile;
      int64_t heads = 1;
      if (decode) {
        // Several kv heads where contexts are short, but no fewer tasks than threads.
        const int64_t keys = task.key_end - task.key_begin, tasks = (threads + batch.sequences - 1) / batch.sequences;
        heads = std::clamp<int64_t>(std::min(kTaskKeys / keys, batch.kv_heads / tasks), 1, batch.kv_heads);
      }
      for (task.kv_head = 0; task.kv_head < batch.kv_heads; task.kv_head += heads) {
        task.kv_heads = std::min(heads, batch.kv_heads - task.kv_head);
        work.push_back({task, kernel});
      }
    }
  }
}

}  // namespace

void run_attention(const AttentionArgs& call, const AttentionBatch& batch) {
  const Kernels& k = kernels();
  AttentionArgs args = call;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  // Kept from call to call, so that a decode step allocates nothing.
  thread_local std::vector<Work> work, shares;
  thread_local std::vector<AttentionTask> share_tasks;
  thread_local std::vector<int64_t> first_share;
  thread_local std::vector<float> partial;
  thread_local std::vector<uint8_t> prepared;
  const AttentionPaths paths = attention_paths(k, args);
  work.clear();
  make_work(args, batch, paths, k.attention, threads, work);
  const auto prefills = [&](const Work& w) { return w.kernel == paths.prefill; };
  if (paths.prefill && std::any_of(work.begin(), work.end(), prefills)) {
    prepared.resize(std::max<size_t>(prepared.size(), paths.prepare.bytes(args)));
    paths.prepare.fill(args, prepared.data());
    args.prepared = prepared.data();
  }
  const auto run = [&](const Work& w) {
    if (batch.writes) write_token(*batch.writes, w.task);
    w.kernel(args, w.task);
  };
  const int64_t count = static_cast<int64_t>(work.size()), wanted = threads > 1 ? kTasksPerThread * threads : 1;
  int64_t keys = 0;
  for (const Work& w : work) keys += w.keys() * w.task.kv_heads;
  const int64_t share = std::max(kShortestShare, round_up(keys / wanted, 2 * kTokenTile));
  // A prompt's contexts stay whole, so that the rest of a prompt after a cached prefix has the bits that the whole
  // prompt gave it: its sums do not depend on how many rows there are to share out.
  const auto cuts = [&](const Work& w) { return w.keys() > share && !prefills(w); };
  const bool splits = count < wanted && std::any_of(work.begin(), work.end(), cuts);
  const Work* all = work.data();
  if (!splits) {
    run_tasks(count, [&](int64_t i) { run(all[i]); });
    return;
  }

  // Few tasks and long contexts: cut the contexts. The cuts follow the number of threads, so the last bits of the
  // result may differ between machines; they never differ between runs.
  share_tasks.clear();
  shares.clear();
  first_share.clear();
  int64_t rows = 0;
  for (const Work& w : work) {
    first_share.push_back(static_cast<int64_t>(shares.size()));
    const int64_t step = cuts(w) ? share : w.keys();
    for (int64_t key = w.task.key_begin; key < w.task.key_end; key += step) {
      shares.push_back(w);
      shares.back().task.key_begin = key;
      shares.back().task.key_end = std::min(w.task.key_end, key + step);
      rows += w.task.queries * args.group * w.task.kv_heads;
    }
  }
  first_share.push_back(static_cast<int64_t>(shares.size()));
  const int64_t width = attention_width(args.page);
  partial.resize(std::max<size_t>(partial.size(), rows * (width + 2)));
  float* at = partial.data();
  for (Work& w : shares) {
    const int64_t n = w.task.queries * args.group * w.task.kv_heads;
    w.task.partial_sum = at;
    w.task.partial_max = at + n * width;
    w.task.partial_denominator = w.task.partial_max + n;
    at = w.task.partial_denominator + n;
    share_tasks.push_back(w.task);
  }
  const Work* cut = shares.data();
  const AttentionTask* tasks = share_tasks.data();
  const int64_t* first = first_share.data();
  run_tasks(static_cast<int64_t>(shares.size()), [&](int64_t i) { run(cut[i]); });
  run_tasks(count, [&](int64_t i) { k.attention_merge(args, {tasks + first[i], first[i + 1] - first[i]}); });
}

}  // namespace resq
