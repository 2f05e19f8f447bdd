// Schemas, dispatch and the Python module. Only the stable ABI of torch >= 2.10 and the limited API of Python are used,
// so that one build serves later versions of both.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "ops.h"

namespace resq {

static std::string isa() { return kernels().name; }

}  // namespace resq

STABLE_TORCH_LIBRARY(resq, m) {
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scales, Tensor wsum, Tensor? bias, int n, int[] segments, "
      "int[] group_bits, int hadamard_groups, Tensor? hadamard_k, int weight_group=0) -> Tensor");
  m.def(
      "linear_planned(Tensor x, Tensor packed, Tensor scales, Tensor wsum, Tensor? bias, Tensor plan, "
      "Tensor? hadamard_k) -> Tensor");
  m.def(
      "norm_linear(Tensor x, Tensor? residual, Tensor weight, float epsilon, Tensor packed, Tensor scales, Tensor wsum, "
      "Tensor? bias, Tensor plan, Tensor? hadamard_k) -> (Tensor, Tensor)");
  m.def(
      "silu_linear(Tensor x, Tensor packed, Tensor scales, Tensor wsum, Tensor? bias, Tensor plan, Tensor? hadamard_k) "
      "-> Tensor");
  m.def(
      "decoder_mlp(Tensor x, Tensor residual, "
      "Tensor o_packed, Tensor o_scales, Tensor o_wsum, Tensor? o_bias, Tensor o_plan, Tensor? o_hadamard_k, "
      "Tensor norm_weight, float norm_epsilon, "
      "Tensor up_packed, Tensor up_scales, Tensor up_wsum, Tensor? up_bias, Tensor up_plan, Tensor? up_hadamard_k, "
      "Tensor down_packed, Tensor down_scales, Tensor down_wsum, Tensor? down_bias, Tensor down_plan, "
      "Tensor? down_hadamard_k) -> (Tensor, Tensor)");
  m.def(
      "between_attentions(Tensor x, Tensor residual, "
      "Tensor o_packed, Tensor o_scales, Tensor o_wsum, Tensor? o_bias, Tensor o_plan, Tensor? o_hadamard_k, "
      "Tensor norm_weight, float norm_epsilon, "
      "Tensor up_packed, Tensor up_scales, Tensor up_wsum, Tensor? up_bias, Tensor up_plan, Tensor? up_hadamard_k, "
      "Tensor down_packed, Tensor down_scales, Tensor down_wsum, Tensor? down_bias, Tensor down_plan, "
      "Tensor? down_hadamard_k, Tensor next_weight, float next_epsilon, "
      "Tensor qkv_packed, Tensor qkv_scales, Tensor qkv_wsum, Tensor? qkv_bias, Tensor qkv_plan, Tensor? qkv_hadamard_k) "
      "-> (Tensor, Tensor)");
  m.def(
      "pack_weight(Tensor? low, Tensor? high, int low_bits, int n, int[] segments, int weight_group=0) -> "
      "(Tensor, Tensor)");
  m.def(
      "quantize_activation(Tensor x, int[] segments, int[] group_bits, int hadamard_groups, Tensor? hadamard_k) -> "
      "(Tensor, Tensor, Tensor)");
  // The three below are implemented in resq_vllm/fused.py for the CPU and in cuda/op_quantize.cpp.
  m.def(
      "quantize_pack(Tensor x, int[] segments, int[] group_bits, int hadamard_groups, Tensor? hadamard_k, "
      "int weight_group=0, bool nibbles=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_quantize(Tensor x, Tensor(a!)? residual, Tensor weight, float epsilon, int[] segments, "
      "int[] group_bits, int weight_group=0, bool nibbles=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "silu_mul_quantize(Tensor gate_up, int[] segments, int[] group_bits, int hadamard_groups, Tensor? hadamard_k, "
      "int weight_group=0, bool nibbles=False) -> (Tensor, Tensor, Tensor)");
  // linear on codes that one of the three above made; implemented for CUDA. raw_run >= 0: a run's exact integers, as the bits
  // of a float32 result; kernel, splits: not the table's choice (tests and measurements).
  m.def(
      "linear_quantized(Tensor codes, Tensor scale, Tensor zero, Tensor packed, Tensor scales, Tensor wsum, "
      "Tensor? bias, int n, int[] segments, int[] group_bits, int weight_group, ScalarType dtype, int raw_run=-1, "
      "str kernel=\"\", int splits=0) -> Tensor");
  m.def(
      "cuda_kernel(int device, int m, int n, int[] segments, int[] group_bits, int low_bits, int weight_group=0) -> str");
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("hadamard(Tensor x, int groups, Tensor? hadamard_k) -> Tensor");
  m.def(
      "kv_write(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor? rotation, int high, "
      "int low_bits) -> ()");
  m.def(
      "attention(Tensor query, Tensor kv_cache, Tensor(a!) out, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, Tensor? rotation, float scale, int high, int low_bits, int sliding_window) -> ()");
  m.def(
      "kv_write_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor(b!) out, "
      "Tensor slot_mapping, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor? rotation, float scale, "
      "int high, int low_bits, int sliding_window) -> ()");
  // Decode attention of GPUs over pages of 64 tokens; implemented for CUDA. splits > 1: their results go to the workspace,
  // float32 [S, Hkv, max_query_len·H/Hkv, splits, head_dim], then the log-sums without the last dim; scale: times log2 e.
  m.def(
      "kv_decode(Tensor query, Tensor kv_cache, Tensor(a!) out, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, float scale, int high, int sliding_window, int max_query_len, int splits, "
      "Tensor(b!)? workspace) -> ()");
  m.def("rope(Tensor(a!) x, Tensor positions, Tensor cos_sin_cache, int heads) -> ()");
  m.def(
      "decoder_stack(Tensor cos_sin_cache, Tensor?[] weights, float[] epsilons, Tensor[] kv_caches, "
      "Tensor?[] rotations, float[] scales, int[] layouts, int query_heads) -> int");
  m.def(
      "run_decoder_stack(int stack, Tensor qkv, Tensor residual, Tensor positions, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens, Tensor query_start_loc) -> (Tensor, Tensor)");
  m.def("drop_decoder_stack(int stack) -> ()");
  m.def("prefer_huge_pages(Tensor x) -> ()");
  m.def("attention_kernels(str dtype, int head_dim, int high, int low_bits) -> str");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("linear", TORCH_BOX(&resq::linear));
  m.impl("linear_planned", TORCH_BOX(&resq::linear_planned));
  m.impl("norm_linear", TORCH_BOX(&resq::norm_linear));
  m.impl("silu_linear", TORCH_BOX(&resq::silu_linear));
  m.impl("decoder_mlp", TORCH_BOX(&resq::decoder_mlp));
  m.impl("between_attentions", TORCH_BOX(&resq::between_attentions));
  m.impl("pack_weight", TORCH_BOX(&resq::pack_weight));
  m.impl("quantize_activation", TORCH_BOX(&resq::quantize_activation));
  m.impl("linear_bf16", TORCH_BOX(&resq::linear_bf16));
  m.impl("hadamard", TORCH_BOX(&resq::hadamard));
  m.impl("kv_write", TORCH_BOX(&resq::kv_write));
  m.impl("attention", TORCH_BOX(&resq::attention));
  m.impl("kv_write_attention", TORCH_BOX(&resq::kv_write_attention));
  m.impl("rope", TORCH_BOX(&resq::rope));
  m.impl("decoder_stack", TORCH_BOX(&resq::decoder_stack));
  m.impl("run_decoder_stack", TORCH_BOX(&resq::run_decoder_stack));
  m.impl("prefer_huge_pages", TORCH_BOX(static_cast<void (*)(const resq::Tensor&)>(&resq::prefer_huge_pages)));
}

STABLE_TORCH_LIBRARY_IMPL(resq, CompositeExplicitAutograd, m) {
  m.impl("attention_kernels", TORCH_BOX(&resq::attention_kernels));
  m.impl("drop_decoder_stack", TORCH_BOX(&resq::drop_decoder_stack));
  m.impl("isa", TORCH_BOX(&resq::isa));
  m.impl("set_isa", TORCH_BOX(&resq::set_isa));
}

// Importing resq_vllm._C loads the library, and loading it registers the ops: the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
