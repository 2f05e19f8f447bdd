// What every CUDA op does with its tensors: rows, device, stream, and one sentence for what went wrong.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/tensors.h"
#include "launch.h"

namespace resq::cuda {

// Makes the tensor's device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(index_, &stream)) throw std::runtime_error("torch has no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* error, const char* op) {
  if (error) throw std::runtime_error(std::string(op) + ": the CUDA kernel could not be launched (" + error + ")");
}

inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), std::string(name) + " must be on x's device");
}

// x [M, columns] with unit stride between columns; copies what is not so.
inline Tensor rows_of(const Tensor& x, int64_t columns, const char* name) {
  if (x.dim() != 2 || x.size(1) != columns)
    check(false, std::string(name) + " must have shape [M, " + std::to_string(columns) + "], not " + shape_of(x));
  float_dtype(x, name);
  return x.stride(1) == 1 || columns == 1 ? x : torch::stable::contiguous(x);
}

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool aligned16(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

}  // namespace resq::cuda
