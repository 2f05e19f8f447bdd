// Query rows -> bfloat16 in the order of the unpacked K, rotated by U_C on the way.
//
// Queries are bfloat16, so q · U_C is a bfloat16 product once U_C is split into two bfloat16 terms (16 bits; what is
// left out, 2^-17, vanishes in the rounding of the result). U_C's columns are put in the order of K's rows and scaled,
// once per call.
#pragma once

#include "attention_rows.h"
#include "exp2.h"
#include "lanes.h"
#include "prefill_unpack.h"

namespace resq {
namespace {

constexpr int64_t kPanelRows = 32;

// C [32, 16 · tiles] = or += A [32, 32 · steps] · B. A's rows lie a_bytes apart, B's tiles b_bytes, C's rows c_floats.
// B may consist of several terms of `steps` each, one after the other, that all meet the same A.
struct Product {
  const uint16_t* a;
  int64_t a_bytes, steps;
  const uint8_t* b;
  int64_t b_bytes, tiles;
  float* c;
  int64_t c_floats;
  int64_t terms = 1;
};

constexpr int64_t kRotationTerms = 2;

// Bytes of a column tile of one term of the split rotation, and of all. Off a multiple of 4096 (cache sets).
RESQ_INLINE int64_t rotation_depth(const PageLayout& p) { return round_up(p.head_dim, 32); }
RESQ_INLINE int64_t rotation_term_bytes(const PageLayout& p) { return rotation_depth(p) / 2 * 64; }
RESQ_INLINE int64_t rotation_tile_bytes(const PageLayout& p) { return kRotationTerms * rotation_term_bytes(p) + 64; }
int64_t rotation_bytes(const AttentionArgs& args) {
  return prefill_shape(args.page).dims / 16 * rotation_tile_bytes(args.page);
}

// U_C (or I) · scale · log2 e in pairs of rows, as columns of the query's order; zero columns where that has padding.
void split_rotation(const AttentionArgs& args, uint8_t* out) {
  const PageLayout& p = args.page;
  const PrefillShape s = prefill_shape(p);
  const int64_t tile_bytes = rotation_tile_bytes(p), term_bytes = rotation_term_bytes(p);
  int32_t source[2 * kMaxHeadDim];
  for (int64_t i = 0; i < s.dims; ++i) source[i] = -1;
  for (int64_t i = 0; i < p.low; ++i) source[key_position(i)] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < p.high; ++i) source[p.low_padded + i] = static_cast<int32_t>(p.low + i);
  const __m512 scale = _mm512_set1_ps(args.scale * kLog2e);
  for (int64_t t = 0; t < s.dims / 16; ++t) {
    const __m512i columns = _mm512_loadu_si512(source + 16 * t);
    const __mmask16 used = _mm512_cmpge_epi32_mask(columns, _mm512_setzero_si512());
    for (int64_t pair = 0; pair < rotation_depth(p) / 2; ++pair) {
      __m512 rest[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = 2 * pair + i;
        __m512 x = _mm512_setzero_ps();
        if (row < p.head_dim && args.rotation) {
          x = _mm512_mask_i32gather_ps(x, used, columns, args.rotation + row * p.head_dim, 4);
        } else if (row < p.head_dim) {
          x = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(columns, _mm512_set1_epi32(static_cast<int>(row))),
                                  _mm512_set1_ps(1.0f));
        }
        rest[i] = _mm512_mul_ps(x, scale);
      }
      for (int64_t term = 0; term < kRotationTerms; ++term) {
        const __m512i pairs = bfloat_pairs(rest[0], rest[1]);
        _mm512_storeu_si512(out + t * tile_bytes + term * term_bytes + pair * 64, pairs);
        rest[0] = _mm512_sub_ps(rest[0], _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        rest[1] = _mm512_sub_ps(rest[1], _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
      }
    }
  }
}

// All rows of a task with one kv head; rows are padded with zeros to whole panels. scratch: [32, depth] bfloat16 and
// [32, dims] float32.
template <class Products>
void load_panels(const AttentionArgs& args, const AttentionTask& task, const PrefillShape& s, uint8_t* scratch,
                 uint16_t* query) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), depth = rotation_depth(p);
  uint16_t* plain = reinterpret_cast<uint16_t*>(scratch);
  float* turned = reinterpret_cast<float*>(scratch + kPanelRows * depth * 2);
  __builtin_memset(plain, 0, static_cast<size_t>(kPanelRows * depth) * 2);
  for (int64_t first = 0; first < rows; first += kPanelRows) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      if (first + r >= rows) {
        __builtin_memset(plain + r * depth, 0, static_cast<size_t>(depth) * 2);
        continue;
      }
      const int64_t token = task.query_row + (first + r) / args.group;
      const int64_t head = task.kv_head * args.group + (first + r) % args.group;
      const uint16_t* from = static_cast<const uint16_t*>(args.query) + token * args.query_token_stride +
                             head * args.query_head_stride;
      int64_t i = 0;
      for (; i + 32 <= p.head_dim; i += 32)
        _mm512_storeu_si512(plain + r * depth + i, _mm512_loadu_si512(from + i));
      for (; i < p.head_dim; ++i) plain[r * depth + i] = from[i];
    }
    const Product x{plain, depth * 2, depth / 32, static_cast<const uint8_t*>(args.prepared), rotation_tile_bytes(p),
                    s.dims / 16, turned, s.dims, kRotationTerms};
    // Rounded one pair of tiles behind the products, whose results are in memory only then.
    const auto round = [&](int64_t t) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        const float* from = turned + r * s.dims + 16 * t;
        _mm512_storeu_si512(query + (first + r) * s.dims + 16 * t,
                            (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from)));
      }
    };
    for (int64_t t = 0; t < x.tiles; t += 2) {
      Products::fence();
      Products::block(x, t, false);
      Products::fence();
      if (t) round(t - 2);
    }
    round(x.tiles - 2);
  }
}

}  // namespace
}  // namespace resq
