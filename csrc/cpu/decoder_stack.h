// A stack of decoder layers, checked once and kept from step to step.
#pragma once

#include <mutex>
#include <tuple>
#include <vector>

#include "kv.h"
#include "mlp.h"
#include "rope.h"

namespace resq {

// The tensors of a stack: what ops.h says of decoder_stack.
struct StackTensors {
  Tensor cos_sin_cache;
  std::vector<std::optional<Tensor>> weights;
  std::vector<Tensor> kv_caches;
  std::vector<std::optional<Tensor>> rotations;
};

class DecoderStack {
 public:
  DecoderStack(StackTensors tensors, std::vector<double> epsilons, std::vector<double> scales,
               std::vector<int64_t> layouts, int64_t query_heads);
  DecoderStack(const DecoderStack&) = delete;  // layers point into tensors_
  DecoderStack& operator=(const DecoderStack&) = delete;

  // The last layer's results: q, k and v of a layer after it, or its MLP's output, and the residual stream. Tensors that
  // were given other memory since the last time (`parameter.data = ...`) are checked again.
  std::tuple<Tensor, Tensor> run(const Tensor& qkv, const Tensor& residual, const Tensor& positions,
                                 const Slots& slots, const Sequences& sequences);

 private:
  struct Norm {
    const void* weight;
    float epsilon;
  };
  // From a layer's q, k and v to the next one's.
  struct Layer {
    PackedCache cache;
    Attending how;
    CheckedLayer o, up, down, qkv;
    Norm after_attention, before_qkv;
    bool has_qkv;
  };

  bool moved() const;
  void prepare();
  Layer layer(size_t i) const;
  Norm norm(const Tensor& weight, double epsilon) const;
  void check_batch(const Slots& slots, const Sequences& sequences, int64_t tokens) const;

  const StackTensors tensors_;
  const std::vector<double> epsilons_, scales_;
  const std::vector<int64_t> layouts_;
  const int64_t query_heads_;
  std::mutex mutex_;  // of what follows
  CosSin table_{};
  int64_t kv_heads_ = 0, hidden_ = 0;
  std::vector<Layer> layers_;
  struct Place {
    const Tensor* tensor;
    const void* data;
  };
  std::vector<Place> places_;  // where the tensors' memory was when layers_ was made
};

}  // namespace resq
