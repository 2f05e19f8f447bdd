// From exact integers to y, in the float operations and the order of resq_vllm/reference.py.
//
// The unit is a quad: the four int32 that a lane holds of a 16 x 8 product, channels c and c + 1 of tokens t and t + 1:
// {(c, t), (c, t + 1), (c + 1, t), (c + 1, t + 1)}.
#pragma once

#include "device.h"
#include "gemm.h"
#include "schedule.h"

namespace resq::cuda {

RESQ_DEVICE GemmRun load_run(const GemmRun* runs, int index) {
  const int4* p = reinterpret_cast<const int4*>(runs + index);
  const int4 a = load(p), b = load(p + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// A lane's two channels in one run.
struct ChannelFactors {
  float scale[2];
  int32_t sum[2];
};

RESQ_DEVICE ChannelFactors channel_factors(const GemmArgs& a, const GemmRun& run, int r, int channel) {
  const float* scale = a.weight_scale + static_cast<int64_t>(run.scale_row) * a.n;
  const int32_t* sum = a.weight_sum + static_cast<int64_t>(r) * a.n;
  // Channels beyond n are computed like the last one and not stored.
  const int first = channel < a.n ? channel : a.n - 1, second = channel + 1 < a.n ? channel + 1 : a.n - 1;
  return {{load(scale + first), load(scale + second)}, {load(sum + first), load(sum + second)}};
}

// I_r of the instructions' sum: 4-bit weights came in as 16·w, so that the shift is exact.
RESQ_DEVICE int32_t exact_integer(int32_t sum, const GemmRun& run, int32_t zero, int32_t weight_sum) {
  return (run.nibbles ? sum >> 4 : sum) - zero * weight_sum;
}

// A lane's two tokens in one activation group.
struct TokenFactors {
  float scale[2];
  int32_t zero[2];
};

RESQ_DEVICE TokenFactors token_factors(const GemmArgs& a, int group, int token) {
  const int64_t last = a.m - 1, first = token < last ? token : last, second = token + 1 < last ? token + 1 : last;
  const int64_t at0 = first * a.groups + group, at1 = second * a.groups + group;
  return {{load_written(a.x_scale + at0), load_written(a.x_scale + at1)},
          {load_written(a.x_zero + at0), load_written(a.x_zero + at1)}};
}

// y += float(I_r) * (x_scale * weight_scale), for a quad. With args.raw_run = r: y's bits are I_r.
RESQ_DEVICE void add_run(const GemmArgs& a, const GemmRun& run, int r, const TokenFactors& x, const ChannelFactors& w,
                         const int32_t (&sums)[4], float (&y)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t integer = exact_integer(sums[2 * i + j], run, x.zero[j], w.sum[i]);
      const float sum = add(y[2 * i + j], multiply(to_float(integer), multiply(x.scale[j], w.scale[i])));
      y[2 * i + j] = a.raw_run < 0 ? sum : a.raw_run == r ? float_of_bits(integer) : y[2 * i + j];
    }
}

// One quad of one run: everything that is needed is loaded here.
RESQ_DEVICE void finish_run(const GemmArgs& a, const GemmRun& run, int r, int token, int channel,
                            const int32_t (&sums)[4], float (&y)[4]) {
  add_run(a, run, r, token_factors(a, run.group, token), channel_factors(a, run, r, channel), sums, y);
}

RESQ_DEVICE float load_float(const void* p, Float type, int64_t index) {
  if (type == Float::f32) return load(static_cast<const float*>(p) + index);
  const uint16_t bits = load(static_cast<const uint16_t*>(p) + index);
  return type == Float::f16 ? half_value(bits) : bfloat_value(bits);
}

// Bias of a lane's two channels, 0 without one.
struct Bias {
  float value[2];
};

RESQ_DEVICE Bias load_bias(const GemmArgs& a, int channel) {
  if (!a.bias || channel >= a.n) return {{0.f, 0.f}};
  return {{load_float(a.bias, a.bias_type, channel), channel + 1 < a.n ? load_float(a.bias, a.bias_type, channel + 1) : 0.f}};
}

// Bias, cast and store of a quad. Two channels go out in one store where rows of y keep its alignment.
RESQ_DEVICE void store_quad(const GemmArgs& a, int token, int channel, const Bias& bias, const float (&y)[4]) {
  if (channel >= a.n) return;
  const bool second = channel + 1 < a.n, together = second && (a.n & 1) == 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (token + j >= a.m) return;
    // Without bias nothing is added: -0 stays.
    const float v0 = a.bias ? add(y[j], bias.value[0]) : y[j], v1 = a.bias ? add(y[2 + j], bias.value[1]) : y[2 + j];
    const int64_t at = static_cast<int64_t>(token + j) * a.n + channel;
    if (a.out_type == Float::f32) {
      float* out = static_cast<float*>(a.out) + at;
      store(out, v0);
      if (second) store(out + 1, v1);
      continue;
    }
    const bool half = a.out_type == Float::f16;
    const uint32_t b0 = half ? half_bits(v0) : bfloat_bits(v0), b1 = half ? half_bits(v1) : bfloat_bits(v1);
    uint16_t* out = static_cast<uint16_t*>(a.out) + at;
    if (together) {
      store(reinterpret_cast<uint32_t*>(out), b0 | (b1 << 16));
    } else {
      store(out, static_cast<uint16_t>(b0));
      if (second) store(out + 1, static_cast<uint16_t>(b1));
    }
  }
}

// --- tiles whose columns are shared by several CTAs ---------------------------------------------------------------------
// The CTA that arrives last of a tile's `splits` finishes it. A barrier for the CTA; `flag_at`: 16 bytes of shared memory.
RESQ_DEVICE bool arrived_last(const GemmArgs& a, int tile, uint32_t flag_at) {
  device_fence();
  barrier();
  if (thread_index() == 0) {
    const bool last = fetch_increment(a.arrived + tile) == static_cast<uint32_t>(a.splits - 1);
    if (last) store(a.arrived + tile, 0u);
    shared_store(flag_at, {last ? 1 : 0, 0, 0, 0});
  }
  barrier();
  const bool last = shared_load(flag_at).x != 0;
  if (last) device_fence();
  return last;
}

// Sums over the splits that hold blocks of run r, of kQuads quads: those of slot 0 lie at partial, `step` apart, and slots
// are `slot` apart. kLoads of them are under way before the first is added: one after the other, each would cost L2's
// latency.
template <int kLoads, int kQuads>
RESQ_DEVICE void sum_splits(const GemmArgs& a, const GemmRun& run, int r, const int4* partial, int64_t slot, int step,
                            int32_t (&sums)[kQuads][4]) {
  constexpr int kAtOnce = kLoads / kQuads;  // splits
  static_assert(kAtOnce * kQuads == kLoads);
  const int first = split_of(a.blocks, a.splits, run.first_block);
  const int last = split_of(a.blocks, a.splits, run.first_block + run.blocks - 1);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
#pragma unroll 1
  for (int s = first; s <= last; s += kAtOnce) {
    const int4* from = partial + (s + r) * slot;
    int4 read[kAtOnce][kQuads];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
        read[j][i] = s + j <= last ? load_fresh(from + j * slot + i * step) : int4{0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        sums[i][0] += read[j][i].x, sums[i][1] += read[j][i].y;
        sums[i][2] += read[j][i].z, sums[i][3] += read[j][i].w;
      }
  }
}

}  // namespace resq::cuda
