// The float epilogue of a block of rows and half a superblock, row by row between the tile products of the next block.
//
// Sums and their order are those of RunTerms: equal bit for bit.
#pragma once

#include "amx_unpack.h"

namespace resq {
namespace {

// Whether a run's raw product and offsets are integers that float32 holds exactly: then they are added as floats, by an
// addition and a fused one where integers take three instructions, one of them of ten cycles.
RESQ_INLINE bool exact_in_float(const RunPlace& run, int32_t bits) {
  return run.length * (bits == 8 ? 128 : 15) * (run.nibbles ? 15 : 255) <= int64_t{1} << 24;
}

// A superblock's constants for the runs that end in a stretch.
struct Ending {
  struct Run {
    int64_t run;
    bool floats;
    // Zero past the last column. `sum` holds floats where `floats`.
    alignas(64) float scale[kSuperblock];
    alignas(64) int32_t sum[kSuperblock];
  };

  int64_t column = 0, n = 0, count = 0;
  bool first = false, last = false;  // the layer's first run is among them, the last one
  alignas(64) float bias[kSuperblock] = {};
  Run runs[kPieces];

  void take(const LinearArgs& args, const Stretch& stretch) {
    column = stretch.superblock * kSuperblock;
    n = min(kSuperblock, args.n - column);
    count = 0;
    for (int64_t i = 0; i < stretch.count; ++i)
      if (stretch.pieces[i].last) take_run(args, stretch.pieces[i].run, runs[count++]);
    first = count && runs[0].run == 0;
    last = count && runs[count - 1].run + 1 == args.plan.n_runs;
    if (last && args.bias) load_row(element(args.bias, args.bias_dtype, column), args.bias_dtype, n, bias);
  }

 private:
  void take_run(const LinearArgs& args, int64_t r, Run& to) {
    const RunPlace& run = args.plan.runs[r];
    to.run = r;
    to.floats = exact_in_float(run, args.plan.group_bits[run.group]);
    const size_t bytes = static_cast<size_t>(n) * 4, rest = sizeof to.scale - bytes;
    __builtin_memcpy(to.scale, args.weight_scale + run.scale_row * args.n + column, bytes);
    __builtin_memcpy(to.sum, args.weight_sum + r * args.n + column, bytes);
    __builtin_memset(to.scale + n, 0, rest);
    __builtin_memset(to.sum + n, 0, rest);
    if (to.floats)
      for (int64_t c = 0; c < kSuperblock; c += W)
        store(reinterpret_cast<float*>(to.sum + c), to_float((VI)load_words(to.sum + c)));
  }
};

// What turns the raw product of a row and run into the exact sum, as floats or as integers, and the row's scale.
struct RowTerms {
  uint32_t start, factor;  // modulo 2^32: partial results may leave int32 before the last term brings them back
  float scale;
};

// terms[row][run] of rows [begin, end).
void take_rows(const LinearArgs& args, int64_t begin, int64_t end, RowTerms* terms) {
  const PlanView& plan = args.plan;
  for (int64_t m = begin; m < end; ++m)
    for (int64_t r = 0; r < plan.n_runs; ++r, ++terms) {
      const RunPlace& run = plan.runs[r];
      const int32_t bits = plan.group_bits[run.group];
      const int64_t at = m * plan.n_groups + run.group;
      const int32_t start = -(run.nibbles ? 8 : 128) * args.sums[m * plan.n_runs + r];
      const int32_t factor = code_offset(bits) - args.zero[at];
      const bool floats = exact_in_float(run, bits);
      terms->start = floats ? bits_of_float(static_cast<float>(start)) : static_cast<uint32_t>(start);
      terms->factor = floats ? bits_of_float(static_cast<float>(factor)) : static_cast<uint32_t>(factor);
      terms->scale = args.scale[at];
    }
}

class Epilogue {
 public:
  static constexpr int64_t kBlockRows = 2 * kTileRows, kBlockWords = kBlockRows * kHalf;

  // terms: of rows [first, ...).
  Epilogue(const LinearArgs& args, const RowTerms* terms, int64_t first)
      : args_(args), terms_(terms), first_(first), around_(around_caches(args)) {}
  ~Epilogue() { finish_writes(around_); }

  // Rows [row, row + rows) and one half of the columns. products[run of the ending][row of the block][column of the
  // half]; y float32 [row of the block][column of the half] goes from stretch to stretch.
  void start(const Ending& ending, int64_t half, const int32_t* products, float* y, int64_t row, int64_t rows) {
    ending_ = &ending;
    column_ = half * kHalf;
    width_ = min(kHalf, ending.n - column_);
    products_ = products;
    y_ = y;
    row_ = row;
    left_ = width_ > 0 ? rows : 0;
    if (ending.last && !around_)
      for (int64_t m = 0; m < min(left_, kAhead); ++m) fetch(row + m);
  }

  void finish() { advance(left_); }

  int64_t left() const { return left_; }

  // At most so many rows more. An even number keeps the branches of every step alike.
  RESQ_INLINE void advance(int64_t rows) {
    for (; rows > 1 && left_ > 1; rows -= 2) next<2>();
    if (rows > 0 && left_ > 0) next<1>();
  }

 private:
  static constexpr int V = kHalf / W;
  static constexpr int64_t kAhead = 8;  // rows whose output lines are fetched early: they lie pages apart

  template <int R>
  RESQ_INLINE void next() {
    const Ending& e = *ending_;
    VF sum[R][V];
    if (!e.first)
#pragma GCC unroll 2
      for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) sum[m][c] = load(y_ + m * kHalf + c * W);
    const int32_t* products = products_;
    for (int64_t i = 0; i < e.count; ++i, products += kBlockWords) {
      VF term[R][V];
#pragma GCC unroll 2
      for (int m = 0; m < R; ++m) find_terms(e.runs[i], row_ + m, products + m * kHalf, term[m]);
      const bool fresh = e.first && i == 0;
#pragma GCC unroll 2
      for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) sum[m][c] = fresh ? term[m][c] : sum[m][c] + term[m][c];
    }
#pragma GCC unroll 2
    for (int m = 0; m < R; ++m) {
      if (e.last) {
        write(sum[m], row_ + m, y_ + m * kHalf);
      } else {
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) store(y_ + m * kHalf + c * W, sum[m][c]);
      }
    }
    products_ += R * kHalf;
    y_ += R * kHalf;
    row_ += R;
    left_ -= R;
  }

  RESQ_INLINE void* out(int64_t row) const {
    return element(args_.out, args_.out_dtype, row * args_.out_stride + ending_->column + column_);
  }

  RESQ_INLINE void fetch(int64_t row) const { __builtin_prefetch(out(row), 1); }

  RESQ_INLINE void find_terms(const Ending::Run& run, int64_t row, const int32_t* products, VF (&term)[V]) const {
    const RowTerms& of_row = terms_[(row - first_) * args_.plan.n_runs + run.run];
    const VF scale = splat(of_row.scale);
    const float* column_scale = run.scale + column_;
    const int32_t* column_sum = run.sum + column_;
    if (run.floats) {
      const VF start = splat(float_of_bits(of_row.start)), factor = splat(float_of_bits(of_row.factor));
#pragma GCC unroll 2
      for (int c = 0; c < V; ++c) {
        const VF raw = to_float((VI)load_words(products + c * W)) + start;
        const VF exact = fma(load(reinterpret_cast<const float*>(column_sum + c * W)), factor, raw);
        term[c] = exact * (load(column_scale + c * W) * scale);
      }
    } else {
      const VU start = of_row.start - VU{}, factor = of_row.factor - VU{};
#pragma GCC unroll 2
      for (int c = 0; c < V; ++c) {
        const VU exact = load_words(products + c * W) + start + load_words(column_sum + c * W) * factor;
        term[c] = to_float((VI)exact) * (load(column_scale + c * W) * scale);
      }
    }
  }

  RESQ_INLINE void write(VF (&sum)[V], int64_t row, float* y) const {
    if (args_.bias)
      for (int c = 0; c < V; ++c) sum[c] = sum[c] + load(ending_->bias + column_ + c * W);
    if (args_.out_dtype == DType::bf16 && width_ == kHalf) {
      store_line(out(row), bfloats(sum[0], sum[1]), around_);
      if (around_) return;
    } else {
      for (int c = 0; c < V; ++c) store(y + c * W, sum[c]);
      store_row(y, args_.out_dtype, width_, out(row));
    }
    fetch(min(row + kAhead, row_ + left_ - 1));
  }

  const LinearArgs& args_;
  const RowTerms* terms_;
  int64_t first_;
  bool around_;
  const Ending* ending_ = nullptr;
  const int32_t* products_ = nullptr;
  float* y_ = nullptr;
  int64_t column_ = 0, width_ = 0, row_ = 0, left_ = 0;
};

}  // namespace
}  // namespace resq
