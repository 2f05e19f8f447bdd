// Checks of op arguments: one sentence that names the op, the argument and what it should be.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace resq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool ok, const std::string& sentence) {
  if (!ok) throw std::runtime_error(sentence);
}
// Literals, and sentences that a function makes: no string is built where all is well.
inline void check(bool ok, const char* sentence) {
  if (!ok) throw std::runtime_error(sentence);
}
template <class F, class = decltype(std::declval<const F&>()())>
void check(bool ok, const F& sentence) {
  if (!ok) throw std::runtime_error(sentence());
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// The dtype of an activation-like tensor.
inline DType float_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: throw std::runtime_error(std::string(name) + " must be float32, float16 or bfloat16");
  }
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name, const char* words) {
  if (t.scalar_type() != dtype) throw std::runtime_error(std::string(name) + " must be " + words);
}

inline void check_contiguous(const Tensor& t, const char* name) {
  if (!t.is_contiguous()) throw std::runtime_error(std::string(name) + " must be contiguous");
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    ok = ok && t.size(i) == size;
    ++i;
  }
  if (ok) return;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  throw std::runtime_error(std::string(name) + " must have shape [" + wanted + "], not " + shape_of(t));
}

}  // namespace resq
