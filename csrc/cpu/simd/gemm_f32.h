// C[m, n] (+)= A[m, k] · B[k, n] in float32, row-major, for small matrices that stay in the cache.
//
// The Hadamard factor H_k, the rotation U_C, Q·Kᵀ and P·V are all this product. Every sum runs over k in order
// and is added to what C holds.
#pragma once

#include "vec.h"

namespace resq {
namespace {

constexpr int kGemmRows = 6;
constexpr int kGemmVectors = W == 16 ? 4 : 2;
// Products of a long sum that are added in order, before these sums are: rounding errors grow with the terms, and in a
// Hadamard factor of order 231 they were 2.3 times those of MKL on a Zen 4.
constexpr int64_t kGemmStretch = 32;

template <int MR, int NV>
void gemm_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  VF acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = VF{};
  for (int64_t i = 0; i < k; ++i) {
    VF row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const VF left = splat(a[r * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(left, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* sum = c + r * ldc + v * W;
      store(sum, add ? load(sum) + acc[r][v] : acc[r][v]);
    }
}

template <int NV>
void gemm_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                  int64_t ldc, bool add) {
  int64_t r = 0;
  while (r < m) {
    const int64_t blocks = (m - r + kGemmRows - 1) / kGemmRows;
    const int64_t rows = (m - r + blocks - 1) / blocks;  // even shares: 8 rows are 4 + 4, not 6 + 2
    const float* left = a + r * lda;
    float* out = c + r * ldc;
    switch (rows) {
      case 1: gemm_tile<1, NV>(k, left, lda, b, ldb, out, ldc, add); break;
      case 2: gemm_tile<2, NV>(k, left, lda, b, ldb, out, ldc, add); break;
      case 3: gemm_tile<3, NV>(k, left, lda, b, ldb, out, ldc, add); break;
      case 4: gemm_tile<4, NV>(k, left, lda, b, ldb, out, ldc, add); break;
      case 5: gemm_tile<5, NV>(k, left, lda, b, ldb, out, ldc, add); break;
      default: gemm_tile<6, NV>(k, left, lda, b, ldb, out, ldc, add); break;
    }
    r += rows;
  }
}

void gemm_f32(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  int64_t col = 0;
  for (; col + kGemmVectors * W <= n; col += kGemmVectors * W)
    gemm_columns<kGemmVectors>(m, k, a, lda, b + col, ldb, c + col, ldc, add);
  for (; col + 2 * W <= n; col += 2 * W) gemm_columns<2>(m, k, a, lda, b + col, ldb, c + col, ldc, add);
  for (; col + W <= n; col += W) gemm_columns<1>(m, k, a, lda, b + col, ldb, c + col, ldc, add);
  for (; col < n; ++col) {
    for (int64_t r = 0; r < m; ++r) {
      float sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) sum += a[r * lda + i] * b[i * ldb + col];
      c[r * ldc + col] = add ? c[r * ldc + col] + sum : sum;
    }
  }
}

// The same where k may be large.
void gemm_f32_stretches(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                        float* c, int64_t ldc, bool add) {
  for (int64_t from = 0; from < k; from += kGemmStretch)
    gemm_f32(m, n, min(kGemmStretch, k - from), a + from, lda, b + from * ldb, ldb, c, ldc, add || from > 0);
}

}  // namespace
}  // namespace resq
