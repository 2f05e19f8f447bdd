// Query rows -> int16 in the order of the unpacked K, with a scale a row, rotated by U_C on the way.
//
// Codes of 16 bits relative to a row's largest are finer than bfloat16's 8 bits for all that weighs in a score. The
// rotation is a product of int16 too: q in 14 bits, U_C in as many as let no sum leave int32.
#pragma once

#include "attention_rows.h"
#include "exp2.h"
#include "int16_products.h"
#include "prefill_int16_unpack.h"

namespace resq {
namespace {

constexpr float kTurnedQuery = 8192.0f;  // largest code of a row before its rotation

// U_C in pairs of rows, as columns of the query's order; before it a line with what undoes its scale.
RESQ_INLINE int64_t turn_pairs(const PageLayout& p) { return round_up(p.head_dim, 32) / 2; }
RESQ_INLINE int64_t turn_tile_bytes(const PageLayout& p) { return turn_pairs(p) * 64 + 64; }
int64_t int16_rotation_bytes(const AttentionArgs& args) {
  return 128 + int16_shape(args.page).query_words / 16 * turn_tile_bytes(args.page);
}
RESQ_INLINE uint8_t* turn_line(const void* prepared) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(prepared) + 63) / 64 * 64);
}

// The largest length of a column of U_C (or I).
float longest_column(const AttentionArgs& args) {
  const int64_t dim = args.page.head_dim;
  if (!args.rotation) return 1.0f;
  float longest = 0.0f;
  for (int64_t j = 0; j < dim; j += 16) {
    const __mmask16 mask = columns_in(0, 0, dim - j);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; ++i) {
      const __m512 x = _mm512_maskz_loadu_ps(mask, args.rotation + i * dim + j);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    longest = max(longest, _mm512_reduce_max_ps(squares));
  }
  return __builtin_sqrtf(longest);
}

// Column 32i + c of the result comes from lane `turned_place(c)` of two tiles: vpackssdw then puts it in its place.
RESQ_INLINE int64_t turned_place(int64_t column) {
  const int64_t c = column % 32;
  return column - c + c / 4 % 2 * 16 + c / 8 * 4 + c % 4;
}

void scale_rotation(const AttentionArgs& args, uint8_t* prepared) {
  const PageLayout& p = args.page;
  const Int16Shape s = int16_shape(p);
  uint8_t* out = turn_line(prepared);
  // |Σ q·u| <= ‖q‖·‖u‖, which must stay below 2^31.
  const float longest = longest_column(args);
  const float bound = 0.98f * 0x1p31f / (kTurnedQuery * __builtin_sqrtf(static_cast<float>(p.head_dim)));
  const float scale = longest > 0.0f ? min(bound, 32000.0f) / longest : 1.0f;
  *reinterpret_cast<float*>(out) = args.scale * kLog2e / scale;
  out += 64;
  int32_t source[2 * kMaxHeadDim];
  for (int64_t i = 0; i < s.query_words; ++i) source[i] = -1;
  for (int64_t i = 0; i < p.low; ++i) source[turned_place(key_position(i))] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < p.high; ++i)
    source[turned_place(p.low_padded + high_key_position(i))] = static_cast<int32_t>(p.low + i);
  for (int64_t t = 0; t < s.query_words / 16; ++t) {
    const __m512i columns = _mm512_loadu_si512(source + 16 * t);
    const __mmask16 used = _mm512_cmpge_epi32_mask(columns, _mm512_setzero_si512());
    const auto row_of = [&](int64_t row) {
      __m512 x = _mm512_setzero_ps();
      if (row < p.head_dim && args.rotation) {
        x = _mm512_mask_i32gather_ps(x, used, columns, args.rotation + row * p.head_dim, 4);
      } else if (row < p.head_dim) {
        x = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(columns, _mm512_set1_epi32(static_cast<int>(row))),
                                _mm512_set1_ps(1.0f));
      }
      return _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(scale)));
    };
    for (int64_t pair = 0; pair < turn_pairs(p); ++pair)
      _mm512_store_si512(out + t * turn_tile_bytes(p) + pair * 64,
                         _mm512_mask_blend_epi16(0xAAAAAAAA, row_of(2 * pair),
                                                 _mm512_slli_epi32(row_of(2 * pair + 1), 16)));
  }
}

// A row [dim] of bfloat16 -> int16 codes [depth] up to kTurnedQuery; returns the scale. Rows of next to nothing are 0.
float quantize_row(const uint16_t* from, int64_t dim, int64_t depth, int16_t* to) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const auto read = [&](int64_t i) {
    const int64_t left = dim - i;
    return left >= 32 ? _mm512_loadu_si512(from + i)
                      : _mm512_maskz_loadu_epi16((__mmask32{1} << max(left, int64_t{0})) - 1, from + i);
  };
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < depth; i += 32)
    largest = _mm512_max_epu16(largest, _mm512_and_si512(read(i), magnitude));
  largest = _mm512_max_epu32(_mm512_slli_epi32(largest, 16), _mm512_and_si512(largest, upper));
  const float most = _mm512_reduce_max_ps(_mm512_castsi512_ps(largest));
  const float factor = most > 0x1p-100f ? kTurnedQuery / most : 0.0f;
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < depth; i += 32) {
    const __m512i both = read(i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(even, scale));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(odd, scale));
    _mm512_store_si512(to + i, _mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(second, 16)));
  }
  return most / kTurnedQuery;
}

constexpr int64_t kTurnedRows = 24;

// All rows of a task with one kv head, zeros up to `padded` of them. scratch: [24, depth] int16 and [24, words] int32.
void load_int16_rows(const AttentionArgs& args, const AttentionTask& task, const Int16Shape& s, int64_t padded,
                     uint8_t* scratch, int16_t* query, float* row_scale) {
  const PageLayout& p = args.page;
  const int64_t rows = task_rows(args, task), depth = 2 * turn_pairs(p), words = s.query_words;
  int16_t* plain = reinterpret_cast<int16_t*>(scratch);
  int32_t* turned = reinterpret_cast<int32_t*>(scratch + kTurnedRows * depth * 2);
  const uint8_t* line = turn_line(args.prepared);
  const float undo = *reinterpret_cast<const float*>(line);
  const auto row_of = [&](int64_t r) {
    const int64_t row = min(r, rows - 1), token = task.query_row + row / args.group;
    const int64_t head = task.kv_head * args.group + row % args.group;
    return static_cast<const uint16_t*>(args.query) + token * args.query_token_stride + head * args.query_head_stride;
  };
  for (int64_t first = 0; first < padded; first += kTurnedRows) {
    const int64_t count = min(padded - first, kTurnedRows);
    for (int64_t r = 0; r < count; ++r) {
      // The rows of the next round arrive during this one's product: waiting for them took 3 % of a short prompt.
      const uint16_t* later = row_of(first + r + kTurnedRows);
      for (int64_t i = 0; i < p.head_dim; i += 32) __builtin_prefetch(later + i);
      row_scale[first + r] = undo * quantize_row(row_of(first + r), p.head_dim, depth, plain + r * depth);
    }
    const auto put = [&](int64_t row, int64_t tile, __m512i sums) {
      _mm512_store_si512(turned + row * words + 16 * tile, sums);
    };
    product(count, plain, depth, line + 64, turn_tile_bytes(p), words / 16, depth / 2, put);
    for (int64_t r = 0; r < count; ++r) {
      const int32_t* from = turned + r * words;
      __m512i largest = _mm512_setzero_si512();
      for (int64_t i = 0; i < words; i += 16)
        largest = _mm512_max_epi32(largest, _mm512_abs_epi32(_mm512_load_si512(from + i)));
      const float most = static_cast<float>(_mm512_reduce_max_epi32(largest));
      const __m512 scale = _mm512_set1_ps(most > 0.0f ? kLargestWord / most : 0.0f);
      const auto code = [&](int64_t i) {
        return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from + i)), scale));
      };
      for (int64_t i = 0; i < words; i += 32)
        _mm512_store_si512(query + (first + r) * words + i, _mm512_packs_epi32(code(i), code(i + 16)));
      row_scale[first + r] *= most / kLargestWord;
    }
  }
}

}  // namespace
}  // namespace resq
