// Query rows -> bfloat16 in the order of the unpacked K, rotated by U_C on the way.
//
// Queries are bfloat16, so q · U_C is a bfloat16 product once U_C is split into two bfloat16 terms (16 bits; what is
// left out, 2^-17, vanishes in the rounding of the result). In float32 the rotation took as long as the rest of a
// prefill of 1024 tokens. U_C's columns are put in the order of K's rows and scaled, once per call.
#pragma once

#include "attention_rows.h"
#include "exp2.h"
#include "lanes.h"
#include "prefill_unpack.h"

namespace resq {
namespace {

constexpr int64_t kPanelRows = 32;

// C [32, 16 · tiles] = or += A [32, 32 · steps] · B. A's rows lie a_bytes apart, B's tiles b_bytes, C's rows c_floats.
struct Product {
  const uint16_t* a;
  int64_t a_bytes, steps;
  const uint8_t* b;
  int64_t b_bytes, tiles;
  float* c;
  int64_t c_floats;
};

// Bytes of a column tile of the split rotation, and of one of its two terms. Off a multiple of 4096 (cache sets).
RESQ_INLINE int64_t rotation_depth(const PageLayout& p) { return round_up(p.head_dim, 32); }
RESQ_INLINE int64_t rotation_tile_bytes(const PageLayout& p) { return rotation_depth(p) / 2 * 64 + 64; }
RESQ_INLINE int64_t rotation_term_bytes(const PageLayout& p) {
  return prefill_shape(p).dims / 16 * rotation_tile_bytes(p);
}

// U_C (or I) · scale · log2 e in pairs of rows, as columns of the query's order; zero columns where that has padding.
void split_rotation(const AttentionArgs& args, uint8_t* out) {
  const PageLayout& p = args.page;
  const PrefillShape s = prefill_shape(p);
  const int64_t tile_bytes = rotation_tile_bytes(p), term_bytes = rotation_term_bytes(p);
  int32_t source[2 * kMaxHeadDim];
  for (int64_t i = 0; i < s.dims; ++i) source[i] = -1;
  for (int64_t i = 0; i < p.low; ++i) source[key_position(i)] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < p.high; ++i) source[s.low_dims + i] = static_cast<int32_t>(p.low + i);
  const __m512 scale = _mm512_set1_ps(args.scale * kLog2e);
  const auto split = [&](__m512 x, __m512i& first, __m512i& second) {
    first = bfloat_bits(x);
    second = bfloat_bits(_mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16))));
  };
  for (int64_t t = 0; t < s.dims / 16; ++t) {
    const __m512i columns = _mm512_loadu_si512(source + 16 * t);
    const __mmask16 used = _mm512_cmpge_epi32_mask(columns, _mm512_setzero_si512());
    for (int64_t pair = 0; pair < rotation_depth(p) / 2; ++pair) {
      __m512i term[2][2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = 2 * pair + i;
        __m512 x = _mm512_setzero_ps();
        if (row < p.head_dim && args.rotation) {
          x = _mm512_mask_i32gather_ps(x, used, columns, args.rotation + row * p.head_dim, 4);
        } else if (row < p.head_dim) {
          x = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(columns, _mm512_set1_epi32(static_cast<int>(row))),
                                  _mm512_set1_ps(1.0f));
        }
        split(_mm512_mul_ps(x, scale), term[0][i], term[1][i]);
      }
      for (int64_t i = 0; i < 2; ++i)
        _mm512_storeu_si512(out + i * term_bytes + t * tile_bytes + pair * 64,
                            _mm512_or_si512(term[i][0], _mm512_slli_epi32(term[i][1], 16)));
    }
  }
}

// A part of a rotated row -> bfloat16, then −Σ of them as three terms at `width`.
RESQ_INLINE void round_part(const float* x, int64_t dims, int64_t width, uint16_t* to) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < dims; i += 16) {
    const __m512i bits = bfloat_bits(_mm512_load_ps(x + i));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(bits));
  }
  float sum = -_mm512_reduce_add_ps(total);
  for (int64_t i = 0; i < kZeroDims; ++i) {
    to[width + i] = float_to_bfloat(sum);
    sum -= bfloat_to_float(to[width + i]);
  }
}

// All rows of a task with one kv head; rows are padded with zeros to whole panels. scratch: [32, depth] bfloat16 and
// [32, dims] float32.
template <class Products>
void load_panels(const AttentionArgs& args, const AttentionTask& task, const PrefillShape& s, uint8_t* scratch,
                 uint16_t* query) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), depth = rotation_depth(p), tile_bytes = rotation_tile_bytes(p);
  uint16_t* plain = reinterpret_cast<uint16_t*>(scratch);
  float* turned = reinterpret_cast<float*>(scratch + kPanelRows * depth * 2);
  const uint8_t* terms = static_cast<const uint8_t*>(args.prepared);
  __builtin_memset(plain, 0, static_cast<size_t>(kPanelRows * depth) * 2);
  for (int64_t first = 0; first < rows; first += kPanelRows) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      if (first + r >= rows) {
        __builtin_memset(plain + r * depth, 0, static_cast<size_t>(depth) * 2);
        continue;
      }
      const int64_t token = task.query_row + (first + r) / args.group;
      const int64_t head = task.kv_head * args.group + (first + r) % args.group;
      __builtin_memcpy(plain + r * depth,
                       static_cast<const uint16_t*>(args.query) + token * args.query_token_stride +
                           head * args.query_head_stride,
                       static_cast<size_t>(p.head_dim) * 2);
    }
    Product x{plain, depth * 2, depth / 32, terms, tile_bytes, s.dims / 16, turned, s.dims};
    Products::fence();
    for (int64_t t = 0; t < x.tiles; t += 2) Products::block(x, t, false);
    x.b += rotation_term_bytes(p);
    for (int64_t t = 0; t < x.tiles; t += 2) Products::block(x, t, true);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      uint16_t* to = query + (first + r) * s.dims;
      round_part(turned + r * s.dims, s.low_dims, p.low_padded, to);
      if (p.high) round_part(turned + r * s.dims + s.low_dims, s.high_dims, p.high_padded, to + s.low_dims);
    }
  }
}

}  // namespace
}  // namespace resq
