#include "decoder_stack.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace resq {
namespace {

constexpr size_t kMlpTensors = 19, kLayerTensors = 26;  // a layer's without and with the next one's norm and qkv
constexpr int64_t kPlaces = 32;                         // tensors to look at that are worth a thread

// Rows of activations that one run needs. From malloc: torch's allocation of an empty tensor took 12 µs, ten a step.
class Workspace {
 public:
  Workspace(int64_t rows, int64_t columns, DType dtype)
      : columns_(columns), dtype_(dtype), data_(std::aligned_alloc(64, (rows * columns * bytes_of(dtype) + 127) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }
  RowsAt rows(int64_t count) const { return {data_, dtype_, count, columns_}; }

 private:
  int64_t columns_;
  DType dtype_;
  void* data_;
};

// Whether a layer's tensor i may be missing: bias and hadamard_k of o, gate_up, down and qkv.
bool may_lack(size_t i) {
  constexpr size_t kFirst[] = {0, 7, 13, 20};
  return std::any_of(std::begin(kFirst), std::end(kFirst), [&](size_t f) { return i == f + 3 || i == f + 5; });
}

void copy_rows(const Tensor& x, void* to) {
  const int64_t value = static_cast<int64_t>(x.element_size()), bytes = x.size(1) * value;
  const uint8_t* from = static_cast<const uint8_t*>(x.const_data_ptr());
  for (int64_t t = 0; t < x.size(0); ++t)
    std::memcpy(static_cast<uint8_t*>(to) + t * bytes, from + t * x.stride(0) * value, static_cast<size_t>(bytes));
}

CheckedLayer linear_at(const std::optional<Tensor>* w) {
  return check_layer(planned_layer(*w[0], *w[1], *w[2], w[3], *w[4], w[5]));
}

}  // namespace

DecoderStack::DecoderStack(StackTensors tensors, std::vector<double> epsilons, std::vector<double> scales,
                           std::vector<int64_t> layouts, int64_t query_heads)
    : tensors_(std::move(tensors)),
      epsilons_(std::move(epsilons)),
      scales_(std::move(scales)),
      layouts_(std::move(layouts)),
      query_heads_(query_heads) {
  const std::vector<std::optional<Tensor>>& weights = tensors_.weights;
  const size_t layers = tensors_.kv_caches.size(), rest = weights.size() % kLayerTensors;
  const bool ends_in_mlp = rest == kMlpTensors;
  check(layers > 0 && (rest == 0 || ends_in_mlp) && weights.size() / kLayerTensors + ends_in_mlp == layers &&
            epsilons_.size() == 2 * layers - ends_in_mlp && tensors_.rotations.size() == layers &&
            scales_.size() == layers && layouts_.size() == 3 * layers,
        "weights, epsilons, rotations, scales and layouts must be those of as many layers as there are kv_caches");
  for (size_t i = 0; i < weights.size(); ++i)
    check(weights[i].has_value() || may_lack(i % kLayerTensors),
          [&] { return "weights[" + std::to_string(i) + "] is missing"; });
  prepare();
}

// Several hundred tensors that are in no cache, 0.1 ms on one thread.
bool DecoderStack::moved() const {
  std::atomic<bool> found{places_.empty()};
  const int64_t count = static_cast<int64_t>(places_.size());
  torch::stable::parallel_for(0, count, kPlaces, [&](int64_t begin, int64_t end) {
    bool same = true;
    for (int64_t i = begin; i < end; ++i) same &= places_[i].tensor->const_data_ptr() == places_[i].data;
    if (!same) found.store(true, std::memory_order_relaxed);
  });
  return found.load(std::memory_order_relaxed);
}

void DecoderStack::prepare() {
  layers_.clear();
  places_.clear();  // until all is well: what throws is tried again at the next run
  table_ = cos_sin(tensors_.cos_sin_cache);
  kv_heads_ = packed_cache(tensors_.kv_caches[0], table_.head_dim, layouts_[0], layouts_[1]).heads;
  hidden_ = linear_at(tensors_.weights.data()).linear.n;
  for (size_t i = 0; i < tensors_.kv_caches.size(); ++i) layers_.push_back(layer(i));
  const auto remember = [&](const Tensor& t) { places_.push_back({&t, t.const_data_ptr()}); };
  remember(tensors_.cos_sin_cache);
  for (const auto* list : {&tensors_.weights, &tensors_.rotations})
    for (const std::optional<Tensor>& t : *list)
      if (t) remember(*t);
  for (const Tensor& t : tensors_.kv_caches) remember(t);
}

DecoderStack::Layer DecoderStack::layer(size_t i) const {
  const std::optional<Tensor>* w = tensors_.weights.data() + kLayerTensors * i;
  const double* epsilon = epsilons_.data() + 2 * i;
  const int64_t head_dim = table_.head_dim, attended = query_heads_ * head_dim, *layout = layouts_.data() + 3 * i;
  const bool last = i + 1 == tensors_.kv_caches.size(), has_qkv = epsilons_.size() > 2 * i + 1;
  Layer made{packed_cache(tensors_.kv_caches[i], head_dim, layout[0], layout[1]),
             attending(tensors_.rotations[i], head_dim, scales_[i], layout[2]),
             linear_at(w),
             linear_at(w + 7),
             linear_at(w + 13),
             {},
             norm(*w[6], epsilon[0]),
             {},
             has_qkv};
  check(made.cache.heads == kv_heads_, [&] {
    return "key has " + std::to_string(kv_heads_) + " heads, but the cache has " + std::to_string(made.cache.heads);
  });
  const auto wide = [&](int64_t found, int64_t wanted, const char* what) {
    check(found == wanted, [&] {
      return std::string(what) + " of layer " + std::to_string(i) + " has " + std::to_string(found) +
             " columns, not " + std::to_string(wanted);
    });
  };
  wide(made.o.plan->columns, attended, "o's input");
  wide(made.o.linear.n, hidden_, "o's output");
  wide(made.up.plan->columns, hidden_, "gate_up's input");
  check_mlp(made.up, made.down);
  wide(made.down.linear.n, hidden_, "down's output");
  if (!has_qkv) return made;
  made.qkv = linear_at(w + 20);
  made.before_qkv = norm(*w[19], epsilon[1]);
  wide(made.qkv.plan->columns, hidden_, "the input of qkv after the MLP");
  if (!last) wide(made.qkv.linear.n, attended + 2 * kv_heads_ * head_dim, "the output of qkv after the MLP");
  return made;
}

DecoderStack::Norm DecoderStack::norm(const Tensor& weight, double epsilon) const {
  check_shape(weight, {hidden_}, "the norm's weight");
  check_contiguous(weight, "the norm's weight");
  check(weight.scalar_type() == tensors_.cos_sin_cache.scalar_type(), "the norm's weight must have cos_sin_cache's dtype");
  return {weight.const_data_ptr(), static_cast<float>(epsilon)};
}

// Layers whose caches and windows are alike are checked once.
void DecoderStack::check_batch(const Slots& slots, const Sequences& sequences, int64_t tokens) const {
  const Layer* before = nullptr;
  for (const Layer& layer : layers_) {
    if (before && before->cache.blocks == layer.cache.blocks && before->how.window == layer.how.window &&
        before->cache.page.tokens == layer.cache.page.tokens)
      continue;
    check_slots(slots, layer.cache, tokens);
    check_sequences(sequences, layer.cache, layer.how.window, tokens);
    before = &layer;
  }
}

std::tuple<Tensor, Tensor> DecoderStack::run(const Tensor& qkv, const Tensor& residual, const Tensor& positions,
                                             const Slots& slots, const Sequences& sequences) {
  const std::lock_guard lock(mutex_);
  if (moved()) prepare();
  const DType dtype = table_.dtype;
  const int64_t head_dim = table_.head_dim, heads = query_heads_ + 2 * kv_heads_, width = heads * head_dim;
  check(qkv.scalar_type() == tensors_.cos_sin_cache.scalar_type(), "cos_sin_cache must have qkv's dtype");
  check(qkv.dim() == 2 && qkv.size(1) == width && qkv.stride(1) == 1, [&] {
    return "qkv must have shape [tokens, " + std::to_string(width) + "] with contiguous rows, not " + shape_of(qkv);
  });
  const int64_t tokens = qkv.size(0);
  check(residual.scalar_type() == qkv.scalar_type(), "residual must have qkv's dtype");
  check_shape(residual, {tokens, hidden_}, "residual");
  check_contiguous(residual, "residual");
  const int64_t* at = check_positions(positions, tokens, table_);
  check_batch(slots, sequences, tokens);

  int64_t inner_rows = 0, inner_width = 0;
  for (const Layer& layer : layers_) {
    inner_width = std::max(inner_width, layer.up.linear.n);
    inner_rows = std::max(inner_rows, mlp_rows_at_once(tokens, layer.up.linear.n * bytes_of(dtype)));
  }
  const int64_t attended_width = query_heads_ * head_dim;
  const Workspace rows(tokens, width, dtype), attended(tokens, attended_width, dtype), projected(tokens, hidden_, dtype),
      middle(tokens, hidden_, dtype), between(tokens, hidden_, dtype), inner(inner_rows, inner_width, dtype),
      mlp(tokens, hidden_, dtype);
  const Layer& last = layers_.back();
  const Tensor y = torch::stable::new_empty(qkv, {tokens, last.has_qkv ? last.qkv.linear.n : hidden_});
  const Tensor stream = torch::stable::new_empty(qkv, {tokens, hidden_});
  copy_rows(qkv, rows.data());  // the caller's own, and rope works in place

  const auto part = [&](const Workspace& x, int64_t columns, int64_t first, int64_t count) -> HeadRows {
    return {row_address(x.data(), dtype, first * head_dim), dtype, tokens, count, head_dim, columns, head_dim};
  };
  const auto norm = [&](const Norm& n, const void* residual, void* sum) -> BeforeArgs {
    return {Before::rms_norm, residual, sum, hidden_, hidden_, n.weight, n.epsilon};
  };
  const void* from = residual.const_data_ptr();
  for (const Layer& layer : layers_) {
    const bool ends = &layer == &last;
    void* const to = ends ? stream.mutable_data_ptr() : between.data();
    turn(rows.data(), tokens, width, query_heads_ + kv_heads_, at, table_);
    write_and_attend(part(rows, width, 0, query_heads_), part(rows, width, query_heads_, kv_heads_),
                     part(rows, width, query_heads_ + kv_heads_, kv_heads_), layer.cache,
                     part(attended, attended_width, 0, query_heads_), slots, sequences, layer.how);
    run_checked(layer.o, attended.rows(tokens), {}, projected.data());
    // After the last layer's MLP, where nothing follows, the stream is the sum before it.
    run_mlp(layer.up, layer.down, projected.rows(tokens),
            norm(layer.after_attention, from, layer.has_qkv ? middle.data() : to), inner.data(),
            layer.has_qkv ? mlp.data() : y.mutable_data_ptr());
    if (!layer.has_qkv) break;
    run_checked(layer.qkv, mlp.rows(tokens), norm(layer.before_qkv, middle.data(), to),
             ends ? y.mutable_data_ptr() : rows.data());
    from = to;
  }
  return {y, stream};
}

}  // namespace resq
