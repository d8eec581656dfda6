#include "rank_tile.h"

namespace lora_fast {
namespace {

// Products that are summed one after another. The error of such a sum grows with its length, so that longer
// ones are sums of these stretches.
constexpr int64_t kStretch = 16;

// C[M × NV vectors] (+)= A B with M · NV accumulators
template <class V, int M, int NV, class F>
LORA_FAST_INLINE void gemm_micro(const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, F* c,
                                 int64_t ldc, int64_t k, bool accumulate) {
  constexpr int64_t lanes = sizeof(V) / sizeof(F);
  V sum[M][NV] = {};
  for (int64_t first = 0; first < k; first += kStretch) {
    V acc[M][NV] = {};
    for (int64_t kk = first; kk < std::min(k, first + kStretch); ++kk) {
      V row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) row[v] = load_bits<V>(b + kk * ldb + v * lanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V x = a[m * a_row + kk * a_col] - V{};
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[m][v] += acc[m][v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      F* out = c + m * ldc + v * lanes;
      store_bits(out, accumulate ? load_bits<V>(out) + sum[m][v] : sum[m][v]);
    }
  }
}

template <class V, int M, class F>
LORA_FAST_INLINE void gemm_rows(const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, F* c,
                                int64_t ldc, int64_t n, int64_t k, bool accumulate) {
  constexpr int64_t lanes = sizeof(V) / sizeof(F);
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes)
    gemm_micro<V, M, 2>(a, a_row, a_col, b + j, ldb, c + j, ldc, k, accumulate);
  for (; j < n; j += lanes) gemm_micro<V, M, 1>(a, a_row, a_col, b + j, ldb, c + j, ldc, k, accumulate);
}

// M rows at a time, as many as leave registers for the rest
template <class V, int M, class F>
LORA_FAST_INLINE void gemm(const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, F* c,
                           int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate) {
  int64_t i = 0;
  for (; i + M <= m; i += M)
    gemm_rows<V, M>(a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, n, k, accumulate);
  for (; i < m; ++i) gemm_rows<V, 1>(a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, n, k, accumulate);
}

#define LORA_FAST_GEMM(target, F, bytes, rows)                                                               \
  target void gemm_for(const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, F* c, int64_t ldc, \
                       int64_t m, int64_t n, int64_t k, bool accumulate) {                                   \
    using V = F __attribute__((vector_size(bytes)));                                                         \
    gemm<V, rows>(a, a_row, a_col, b, ldb, c, ldc, m, n, k, accumulate);                                     \
  }

// One vector is one register of the instruction set.
#if LORA_FAST_HAS_CLONES
LORA_FAST_GEMM(__attribute__((target("arch=x86-64-v4"))), float, 64, 8)
LORA_FAST_GEMM(__attribute__((target("arch=x86-64-v4"))), double, 64, 8)
LORA_FAST_GEMM(__attribute__((target("arch=x86-64-v3"))), float, 32, 6)
LORA_FAST_GEMM(__attribute__((target("arch=x86-64-v3"))), double, 32, 6)
LORA_FAST_GEMM(__attribute__((target("default"))), float, 16, 6)
LORA_FAST_GEMM(__attribute__((target("default"))), double, 16, 6)
#elif defined(__AVX512F__)
LORA_FAST_GEMM(, float, 64, 8)
LORA_FAST_GEMM(, double, 64, 8)
#elif defined(__AVX2__)
LORA_FAST_GEMM(, float, 32, 6)
LORA_FAST_GEMM(, double, 32, 6)
#else
LORA_FAST_GEMM(, float, 16, 6)
LORA_FAST_GEMM(, double, 16, 6)
#endif

}  // namespace

void gemm_tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate) {
  gemm_for(a, a_row, a_col, b, ldb, c, ldc, m, n, k, accumulate);
}

void gemm_tile(const double* a, int64_t a_row, int64_t a_col, const double* b, int64_t ldb, double* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate) {
  gemm_for(a, a_row, a_col, b, ldb, c, ldc, m, n, k, accumulate);
}

}  // namespace lora_fast
