// The quantize and Hadamard kernels' own source on the host, behind C functions for ctypes.
#include "cuda_words.h"

#include "../../../csrc/cpu/plan.cpp"
#include "hadamard_kernel.cuh"
#include "plan.cpp"
#include "quantize_contiguous.cuh"
#include "quantize_kernel.cuh"
#include "quantize_plan.cpp"

using namespace resq::cuda;

namespace {

std::string message;

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

std::vector<int64_t> list(const int64_t* values, int64_t count) { return {values, values + count}; }

template <class T>
void launch(const QuantizeArgs& args, bool transform, int threads, uint32_t seed) {
  const int64_t shared = transform ? hadamard_shared_bytes(args.columns, args.hadamard_k, args.staging)
                                   : quantize_shared_bytes(args.columns, sizeof(T), args.staging);
  emulator::launch(args.rows * args.blocks, 1, threads, static_cast<int>(shared), seed, [&] {
    if (!transform) return quantize_kernel<T>(args);
    hadamard_kernel<T>(args);
    emulator::require_waited();
  });
}

void launch(const QuantizeArgs& args, int64_t dtype, bool transform, int threads, uint32_t seed) {
  if (dtype == 0) launch<float>(args, transform, threads, seed);
  if (dtype == 1) launch<f16_t>(args, transform, threads, seed);
  if (dtype == 2) launch<bf16_t>(args, transform, threads, seed);
}

template <class T, int kHeld>
void launch_contiguous(const ContiguousArgs& args, int rows, uint32_t seed) {
  emulator::launch(rows, 1, contiguous_threads(args.vectors, kHeld), kContiguousShared, seed, [&] {
    args.weight ? contiguous_kernel<T, kHeld, true>(args) : contiguous_kernel<T, kHeld, false>(args);
  });
}

template <class T>
void launch_contiguous(const ContiguousArgs& args, int rows, int64_t held, uint32_t seed) {
  held == 1 ? launch_contiguous<T, 1>(args, rows, seed) : launch_contiguous<T, kHeldVectors>(args, rows, seed);
}

}  // namespace

extern "C" {

const char* resq_message() { return message.c_str(); }

struct Rows {
  const void* x;
  int64_t rows, x_stride, dtype, aligned, threads, seed;
  const void* weight;
  void* residual;
  double epsilon;
  int64_t silu_mul;
  const float* dense;
  int64_t held;  // vectors a thread of the kernel of contiguous rows (1 or kHeldVectors), 0 = the other kernels
  int64_t dense_order, hadamard_groups;
  const int64_t* segments;
  int64_t n_segments;
  const int64_t* group_bits;
  int64_t n_groups, weight_group, nibbles, column_order;
  uint8_t* codes;
  float* scale;
  int32_t* zero;
  int64_t row_bytes, blocks;  // out
};

// With codes null only the sizes are filled in.
int resq_quantize(Rows* r) {
  return guarded([&] {
    const ActivationPlan plan = make_activation_plan(list(r->segments, r->n_segments), list(r->group_bits, r->n_groups),
                                                     r->weight_group, r->nibbles);
    QuantizeArgs args =
        make_quantize_args(plan, r->hadamard_groups, r->dense_order, r->column_order ? Order::columns : Order::parts);
    r->row_bytes = args.row_bytes;
    r->blocks = args.blocks;
    if (!r->codes) return;
    args.x = r->x;
    args.x_stride = r->x_stride;
    args.rows = static_cast<int32_t>(r->rows);
    args.aligned = static_cast<int32_t>(r->aligned);
    args.weight = r->weight;
    args.residual = r->residual;
    args.residual_stride = plan.columns;
    args.epsilon = static_cast<float>(r->epsilon);
    args.silu_mul = static_cast<int32_t>(r->silu_mul);
    args.dense = r->dense;
    args.codes = r->codes;
    args.scale = r->scale;
    args.zero = r->zero;
    if (r->held) {
      ContiguousArgs contiguous;
      if (!contiguous_rows(args, r->dtype ? 2 : 4, contiguous)) throw std::runtime_error("not contiguous");
      if (r->dtype == 1) return launch_contiguous<f16_t>(contiguous, args.rows, r->held, static_cast<uint32_t>(r->seed));
      return launch_contiguous<bf16_t>(contiguous, args.rows, r->held, static_cast<uint32_t>(r->seed));
    }
    launch(args, r->dtype, args.hadamard_n > 1 || args.silu_mul, static_cast<int>(r->threads),
           static_cast<uint32_t>(r->seed));
  });
}

int resq_hadamard(const void* x, void* out, int64_t rows, int64_t columns, int64_t groups, const float* dense, int64_t k,
                  int64_t dtype, int64_t threads) {
  return guarded([&] {
    QuantizeArgs args = make_hadamard_args(columns, groups, k);
    args.x = x;
    args.out = out;
    args.x_stride = columns;
    args.rows = static_cast<int32_t>(rows);
    args.dense = dense;
    launch(args, dtype, true, static_cast<int>(threads), 1);
  });
}

// The runs and spans of a plan, six and four numbers each; `counts`: runs, spans, row bytes, pitch of the low part.
int resq_plan(const int64_t* segments, int64_t n_segments, const int64_t* group_bits, int64_t n_groups,
              int64_t weight_group, int64_t nibbles, int32_t* runs, int32_t* spans, int64_t* counts) {
  return guarded([&] {
    const ActivationPlan plan =
        make_activation_plan(list(segments, n_segments), list(group_bits, n_groups), weight_group, nibbles);
    if (runs) std::memcpy(runs, plan.runs.data(), plan.runs.size() * sizeof(RunSpan));
    if (spans) std::memcpy(spans, plan.spans.data(), plan.spans.size() * sizeof(ColumnSpan));
    counts[0] = static_cast<int64_t>(plan.runs.size());
    counts[1] = static_cast<int64_t>(plan.spans.size());
    counts[2] = plan.row_bytes;
    counts[3] = plan.pitch[0];
  });
}

uint32_t resq_pack_nibbles(uint32_t low4, uint32_t high4) { return pack_nibbles(low4, high4); }

uint32_t resq_code_at(const uint8_t* row, int64_t column, int64_t nibbles) {
  return code_at(row, column, nibbles ? Store::u4 : Store::u8);
}

// Counts the pairs whose quotient is not the division's.
int64_t resq_wrong_quotients(const float* x, const float* d, int64_t n) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float quotient = Divisor::of(d[i]).quotient(x[i]), exact = x[i] / d[i];
    // What rounds to 0 may differ below it: the codes do not.
    wrong += quotient != exact && !(std::fabs(exact) < 0.25f && std::fabs(quotient) < 0.25f);
  }
  return wrong;
}

float resq_quotient_of_half(float x, float d) { return quotient_of_half(x, divide(1.0f, d), d); }

// Counts the pairs that are rounded to another integer than the division's quotient.
int64_t resq_wrong_half_quotients(const float* x, const float* d, int64_t n) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i)
    wrong += round_to_int(quotient_of_half(x[i], divide(1.0f, d[i]), d[i])) != round_to_int(x[i] / d[i]);
  return wrong;
}

// What the functions of packed.h make of two pairs.
uint32_t resq_pairs(int64_t bfloat, int64_t which, uint32_t a, uint32_t b) {
  const auto of = [&]<class T>(T) {
    switch (which) {
      case 0: return min_pairs<T>(a, b);
      case 1: return max_pairs_or_nan<T>(a, b);
      case 2: return add_pairs<T>(a, b);
      default: return multiply_pairs<T>(a, b);
    }
  };
  return bfloat ? of(bf16_t{}) : of(f16_t{});
}

// Vectors a thread and threads of the launch for `rows` rows of contiguous vectors.
int64_t resq_held_vectors(int64_t rows, int64_t vectors) {
  return held_vectors(static_cast<int>(rows), static_cast<int>(vectors));
}
int64_t resq_contiguous_threads(int64_t vectors, int64_t held) {
  return contiguous_threads(static_cast<int>(vectors), static_cast<int>(held));
}

// All 2^16 halves of either type to float, and back: the number that do not return.
void resq_halves(int64_t bfloat, float* out) {
  for (uint32_t i = 0; i < 65536; ++i)
    out[i] = bfloat ? to_float(bf16_t{static_cast<uint16_t>(i)}) : to_float(f16_t{static_cast<uint16_t>(i)});
}
void resq_to_halves(int64_t bfloat, const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat ? from_float<bf16_t>(x[i]).bits : from_float<f16_t>(x[i]).bits;
}

}  // extern "C"
