// Decode attention over the packed pages: one warp takes a sequence, a kv head with its whole group of query heads, and one
// split of the context, a page of 64 tokens at a time.
//
// Codes become bf16 without a conversion: a nibble in the low mantissa bits of 128 is 128 + c, and one and/or of a word
// with a shift makes two of them, the halves of a register. The page's order of nibbles is such that these registers are
// the tensor cores' fragments as they stand: a lane's word of keys holds 8 dims of a token, of values 4 tokens of two dims
// 8 rows apart. An 8-bit code is two nibbles, lo + 16·hi. Scores are K·qᵀ, tokens down the rows, so that a warp's 16 rows
// are tokens and not query rows of which there are few; their probabilities are transposed once (movmatrix) on the way to
// Vᵀ·P. The 128s and the zero points leave with one multiplication: of the keys' by the query's sum, of the values' as one
// more row of codes.
//
// Per page of 64 tokens at head_dim 128 that is about 1300 instructions of the warp (sm_90a; 84 of them tensor-core
// products, with 8 query rows or fewer), against 480 clocks in which a processor of an H200 receives the page's 9984
// bytes: four schedulers issue 1300 in 325. On paper the memory is the bound; not run on a GPU.
#pragma once

#include <cmath>
#include <type_traits>

#include "kv_decode_args.h"
#include "kv_device.h"
#include "kv_page.h"

namespace resq::cuda {

// Which pages a split of a sequence takes: as _tiles in resq_vllm/gpu_kv/decode.py, whose merge reads the results.
struct KvSpan {
  int32_t begin, end, used;
};
RESQ_HD KvSpan kv_span(int32_t length, int32_t queries, int32_t window, int32_t splits, int32_t split) {
  const int32_t unseen = window > 0 ? length - queries - window + 1 : 0;
  const int32_t first = unseen > 0 ? unseen / kPageTokens : 0, last = (length + kPageTokens - 1) / kPageTokens;
  int32_t step = (last - first + splits - 1) / splits;
  step = step > 1 ? step : 1;
  const int32_t begin = first + split * step, end = begin + step < last ? begin + step : last;
  return {begin, end, (last - first + step - 1) / step};
}

template <class P, int kRows8>
struct KvDecodeWarp {
  static constexpr int kWords = P::kLowWidth / 4, kWordGroups = (kWords + 3) / 4;  // of a token's low dims
  static constexpr int kHighWords = P::kHighWidth / 4;
  static constexpr int kLowTiles = (P::kLowWidth + 7) / 8, kHighTiles = (P::kHighWidth + 7) / 8;
  static constexpr float kLowOffset = 128.0f, kHighOffset = 17 * 128.0f;
  static constexpr float kNothing = -INFINITY;

  const KvDecodeArgs& a;
  int lane, across, down;  // lane % 4 and lane / 4: the fragments' column pair and row
  uint32_t query_low[kRows8][kWordGroups][2][2], query_high[kRows8][2][2];
  float sum_low[kRows8][2], sum_high[kRows8][2];  // of the query rows of this lane's columns
  int32_t position[kRows8][2];                    // last token that they see
  float maximum[kRows8][2], total[kRows8][2];     // total: of this lane's tokens
  float low[kLowTiles][kRows8][4], high[kHighTiles][kRows8][4], zero_low[kRows8][4], zero_high[kRows8][4];

  RESQ_DEVICE explicit KvDecodeWarp(const KvDecodeArgs& args)
      : a(args), lane(thread_index()), across(lane & 3), down(lane >> 2) {}

  // Element `i` of loaded words, rounded to bf16.
  template <int kWordsLoaded>
  RESQ_DEVICE float element(const uint32_t (&words)[kWordsLoaded], int i) const {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    return a.half ? bfloat_value(static_cast<uint16_t>(bfloat_bits(half_value(bits)))) : bfloat_value(bits);
  }

  // The query as the second operand: this lane's row is down, its dims are those of the words that `across` names.
  RESQ_DEVICE void load_query(int32_t first, int32_t queries, int32_t length, int32_t head) {
#pragma unroll
    for (int t = 0; t < kRows8; ++t) {
      const int32_t row = 8 * t + down;
      const bool there = row < queries * a.group;
      const uint16_t* from = a.query + (first + row / a.group) * a.query_token +
                             static_cast<int64_t>(head * a.group + row % a.group) * a.query_head;
      float low_sum = 0.0f, high_sum = 0.0f;
#pragma unroll
      for (int g = 0; g < kWordGroups; ++g) {
        const int word = 4 * g + across;
        uint32_t dims[4] = {0, 0, 0, 0};
        if (there && word < kWords) {
          const uint4 eight = load_written(reinterpret_cast<const uint4*>(from + 8 * word));
          dims[0] = eight.x, dims[1] = eight.y, dims[2] = eight.z, dims[3] = eight.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // nibbles i and i + 4 of the word
          float v[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int d = 4 * (i & 1) + (i >> 1) + 2 * j;
            v[j] = P::kLow % 8 == 0 || 8 * word + d < P::kLow ? element(dims, d) : 0.0f;
          }
          low_sum += v[0] + v[1];
          query_low[t][g][i >> 1][i & 1] = bfloat_pair(v[0], v[1]);
        }
      }
      uint32_t dims[2] = {0, 0};
      if (there && across < kHighWords) {
        const uint2 four = load_written(reinterpret_cast<const uint2*>(from + P::kLow + 4 * across));
        dims[0] = four.x, dims[1] = four.y;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // bytes i and i + 2: their low nibbles, then their high ones
        const float v[2] = {element(dims, i), element(dims, i + 2)};
        high_sum += v[0] + v[1];
        query_high[t][i][0] = bfloat_pair(v[0], v[1]);
        query_high[t][i][1] = bfloat_pair(16 * v[0], 16 * v[1]);
      }
      low_sum += from_lane_xor(low_sum, 1), high_sum += from_lane_xor(high_sum, 1);
      low_sum += from_lane_xor(low_sum, 2), high_sum += from_lane_xor(high_sum, 2);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum_low[t][c] = from_lane(low_sum, 4 * (2 * across + c));
        sum_high[t][c] = from_lane(high_sum, 4 * (2 * across + c));
        position[t][c] = length - queries + (8 * t + 2 * across + c) / a.group;
        maximum[t][c] = kNothing, total[t][c] = 0.0f;
      }
    }
    clear(low), clear(high), clear(zero_low), clear(zero_high);
  }
  template <class T>
  RESQ_DEVICE static void clear(T& v) {
    if constexpr (std::is_array_v<T>) {
#pragma unroll
      for (auto& part : v) clear(part);
    } else {
      v = T{};
    }
  }

  RESQ_DEVICE void fetch(const uint8_t* page, uint32_t to) const {
#pragma unroll
    for (int i = 0; i < (P::kBytes / 16 + 31) / 32; ++i)
      if (const int chunk = lane + 32 * i; (i + 1) * 32 <= P::kBytes / 16 || chunk < P::kBytes / 16)
        copy_async(to + 16 * chunk, page + 16 * chunk, 16);
  }

  // 128 + c of the nibbles `first` and `first` + 4 of a word, as bf16.
  RESQ_DEVICE static uint32_t pair_of(uint32_t word, int first) { return and_or(word >> (4 * first), 0x000f000fu, 0x43004300u); }
  RESQ_DEVICE static float half_of(uint32_t pair, int which) { return half_value(static_cast<uint16_t>(pair >> (16 * which))); }
  // A byte's value plus `offset`: through float32's mantissa, 2^23 + z.
  RESQ_DEVICE static float zero_of(uint32_t bytes, int which, float offset) {
    return float_of_bits(static_cast<int32_t>(0x4b000000u | (bytes >> (8 * which) & 0xff))) - (8388608.0f - offset);
  }

  // Base-2 scores of 16 tokens, rows `down` and `down` + 8 of the fragment being tokens 2·down and the next one.
  RESQ_DEVICE void score(uint32_t page, int tile, float (&scores)[kRows8][4]) const {
    float by_low[kRows8][4], by_high[kRows8][4];
    clear(by_low), clear(by_high);
#pragma unroll
    for (int g = 0; g <= kWordGroups; ++g) {
      // The last group are the words of the high dims. Words beyond a plane meet zeros of the query.
      const bool is_high = g == kWordGroups;
      const uint2 words = shared_load_8(page + (is_high ? P::kKeyHigh : P::kKeyLow) + 8 * down +
                                        64 * (tile * (is_high ? kHighWords : kWords) + (is_high ? 0 : 4 * g) + across));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t keys[4] = {pair_of(words.x, 2 * h), pair_of(words.y, 2 * h), pair_of(words.x, 2 * h + 1),
                                  pair_of(words.y, 2 * h + 1)};
#pragma unroll
        for (int t = 0; t < kRows8; ++t) {
          if (is_high)
            mma_bf16(by_high[t], keys, query_high[t][h][0], query_high[t][h][1]);
          else
            mma_bf16(by_low[t], keys, query_low[t][g < kWordGroups ? g : 0][h][0], query_low[t][g < kWordGroups ? g : 0][h][1]);
        }
      }
    }
    const uint32_t token = 16 * tile + 2 * down;
    const uint32_t scale_low = shared_load_4(page + P::kScales + 2 * token);
    const uint32_t scale_high = shared_load_4(page + P::kScales + 2 * (kPageTokens + token));
    const uint32_t zeros_low = shared_load_2(page + P::kZeros + token);
    const uint32_t zeros_high = shared_load_2(page + P::kZeros + kPageTokens + token);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float of_low = half_of(scale_low, i) * a.scale, of_high = half_of(scale_high, i) * a.scale;
      const float at_low = zero_of(zeros_low, i, kLowOffset), at_high = zero_of(zeros_high, i, kHighOffset);
#pragma unroll
      for (int t = 0; t < kRows8; ++t)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          scores[t][2 * i + c] = of_low * (by_low[t][2 * i + c] - at_low * sum_low[t][c]) +
                                 of_high * (by_high[t][2 * i + c] - at_high * sum_high[t][c]);
    }
  }

  // Adds the values of 16 tokens, weighted. seen[i]: some row may see token 2·down + i.
  RESQ_DEVICE void add_values(uint32_t page, int tile, const float (&p)[kRows8][4], const bool (&seen)[2]) {
    const uint32_t token = 16 * tile + 2 * down;
    const uint32_t scale_low = shared_load_4(page + P::kScales + 2 * (2 * kPageTokens + token));
    const uint32_t scale_high = shared_load_4(page + P::kScales + 2 * (3 * kPageTokens + token));
    uint32_t by_low[kRows8][2], by_high[kRows8][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A scale behind the sequence's end, or before its window in a page given up, may be anything, NaN included.
      const float of_low = seen[i] ? half_of(scale_low, i) : 0.0f, of_high = seen[i] ? half_of(scale_high, i) : 0.0f;
#pragma unroll
      for (int t = 0; t < kRows8; ++t) {
        by_low[t][i] = transpose_matrix(bfloat_pair(p[t][2 * i] * of_low, p[t][2 * i + 1] * of_low));
        by_high[t][i] = transpose_matrix(bfloat_pair(p[t][2 * i] * of_high, p[t][2 * i + 1] * of_high));
      }
    }
    const uint32_t quad = 4 * tile + across;
    const uint32_t of_low = page + P::kValueLow + quad * P::kLowWidth * 4 + 4 * down;
    const uint32_t of_high = page + P::kValueHigh + quad * P::kHighWidth * 4 + 4 * down;
#pragma unroll
    for (int j = 0; j < kLowTiles; ++j) add(of_low + 32 * j, by_low, low[j]);
#pragma unroll
    for (int j = 0; j < kHighTiles; ++j) add(of_high + 32 * j, by_high, high[j]);
    add(page + P::kZeros + 2 * kPageTokens + 4 * quad, by_low, zero_low);
    add(page + P::kZeros + 3 * kPageTokens + 4 * quad, by_high, zero_high);
  }
  RESQ_DEVICE static void add(uint32_t at, const uint32_t (&weights)[kRows8][2], float (&sums)[kRows8][4]) {
    const uint32_t word = shared_load_4(at);
    const uint32_t values[4] = {pair_of(word, 0), pair_of(word, 1), pair_of(word, 2), pair_of(word, 3)};
#pragma unroll
    for (int t = 0; t < kRows8; ++t) mma_bf16(sums[t], values, weights[t][0], weights[t][1]);
  }

  // A page of tokens from `start` on. masked: some row does not see some token of it. oldest: first token that any row sees.
  RESQ_DEVICE void attend(uint32_t page, int32_t start, bool masked, int32_t length, int32_t oldest) {
    float p[4][kRows8][4];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) score(page, tile, p[tile]);
    if (masked) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int t = 0; t < kRows8; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int32_t token = start + 16 * tile + 2 * down + (i >> 1), last = position[t][i & 1];
            if (token > last || (a.window > 0 && token <= last - a.window)) p[tile][t][i] = kNothing;
          }
    }
#pragma unroll
    for (int t = 0; t < kRows8; ++t)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float most = maximum[t][c];
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) most = fmaxf(most, fmaxf(p[tile][t][c], p[tile][t][2 + c]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) most = fmaxf(most, from_lane_xor(most, step));
        // A row that has seen nothing yet keeps 0 everywhere instead of exp2(-inf + inf).
        const float finite = most == kNothing ? 0.0f : most;
        const float alpha = exp2_of(maximum[t][c] - finite);
        maximum[t][c] = most;
        float sum = total[t][c] * alpha;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            p[tile][t][2 * i + c] = exp2_of(p[tile][t][2 * i + c] - finite);
            sum += p[tile][t][2 * i + c];
          }
        total[t][c] = sum;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < kLowTiles; ++j) low[j][t][2 * i + c] *= alpha;
#pragma unroll
          for (int j = 0; j < kHighTiles; ++j) high[j][t][2 * i + c] *= alpha;
          zero_low[t][2 * i + c] *= alpha, zero_high[t][2 * i + c] *= alpha;
        }
      }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      bool seen[2] = {true, true};
      if (masked) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t token = start + 16 * tile + 2 * down + i;
          seen[i] = token < length && token >= oldest;
        }
      }
      add_values(page, tile, p[tile], seen);
    }
  }

  // f(row, dim, value) for every dim of this lane's columns; also the rows' log-sums, from one lane each.
  template <class Value, class LogSum>
  RESQ_DEVICE void finish(int32_t rows, Value value, LogSum log_sum) {
#pragma unroll
    for (int t = 0; t < kRows8; ++t)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = total[t][c];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum += from_lane_xor(sum, step);
        const int32_t row = 8 * t + 2 * across + c;
        if (row >= rows) continue;
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        if (down == 0) log_sum(row, maximum[t][c] + log2_of(sum));
#pragma unroll
        for (int j = 0; j < kLowTiles; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int byte = 8 * j + down, dim = byte + i * P::kLowWidth;
            if (byte < P::kLowWidth && dim < P::kLow) value(row, dim, (low[j][t][2 * i + c] - zero_low[t][c]) * factor);
          }
        const float zero = zero_high[t][c] + 16 * zero_high[t][2 + c];
#pragma unroll
        for (int j = 0; j < kHighTiles; ++j)
          if (const int dim = 8 * j + down; dim < P::kHigh)
            value(row, P::kLow + dim, (high[j][t][c] + 16 * high[j][t][2 + c] - zero) * factor);
      }
  }
};

template <class P>
constexpr int kKvDecodeShared = 2 * P::kBytes;

template <class P, int kRows8>
RESQ_DEVICE void kv_decode(const KvDecodeArgs& a) {
  wait_for_previous_kernel();
  const int32_t split = block_x() % a.splits, pair = block_x() / a.splits;
  const int32_t head = pair % a.kv_heads, sequence = pair / a.kv_heads;
  const int32_t length = load_written(a.seq_lens + sequence), first = load_written(a.query_start + sequence);
  const int32_t queries = load_written(a.query_start + sequence + 1) - first;
  const KvSpan span = kv_span(length, queries, a.window, a.splits, split);
  if (split >= span.used || queries <= 0) return;

  KvDecodeWarp<P, kRows8> warp(a);
  const int32_t* table = a.block_table + sequence * a.table_row;
  const uint8_t* heads = a.cache + head * a.cache_head;
  const uint32_t stages = shared_base();
  int32_t block = load_written(table + span.begin);  // of the page that is fetched next: the copies do not wait for it
  const auto fetch = [&](int32_t page, int stage) {
    if (page < span.end) warp.fetch(heads + block * a.cache_block, stages + stage * P::kBytes);
    copy_async_commit();
    if (page + 1 < span.end) block = load_written(table + page + 1);
  };
  fetch(span.begin, 0);
  warp.load_query(first, queries, length, head);
  // Pages before this one are seen whole by every row, unless a window begins in them.
  const int32_t whole = a.window > 0 ? 0 : (length - queries + 1) / kPageTokens;
  const int32_t oldest = a.window > 0 ? length - queries - a.window + 1 : 0;
  for (int32_t page = span.begin; page < span.end; ++page) {
    const int stage = (page - span.begin) & 1;
    fetch(page + 1, stage ^ 1);
    copy_async_wait<1>();
    warp_barrier();  // every lane's copies have landed
    warp.attend(stages + stage * P::kBytes, page * kPageTokens, page >= whole, length, oldest);
    warp_barrier();  // every lane is done with what the next copies overwrite
  }

  const int32_t rows = queries * a.group;
  const auto row_place = [&](int32_t row) { return (static_cast<int64_t>(pair) * a.rows + row) * a.splits + split; };
  if (span.used == 1) {
    warp.finish(
        rows,
        [&](int32_t row, int dim, float v) {
          uint16_t* to = a.output + (first + row / a.group) * a.output_token +
                         static_cast<int64_t>(head * a.group + row % a.group) * a.output_head;
          store(to + dim, static_cast<uint16_t>(a.half ? half_bits(v) : bfloat_bits(v)));
        },
        [](int32_t, float) {});
  } else {
    warp.finish(
        rows, [&](int32_t row, int dim, float v) { store(a.partial + row_place(row) * P::kHeadDim + dim, v); },
        [&](int32_t row, float v) { store(a.log_sums + row_place(row), v); });
  }
}

}  // namespace resq::cuda
