// The primitive that every kernel shares: one tile of the rank-R product,
//   C[rows × cols] = P[rows × R] · Q[R × cols],   rows ≤ kTileRows, cols ≤ kTileCols,
// from packed P and Q. Two ways: float or double vectors, and AMX for bfloat16 factors (exact products,
// float32 accumulation). The caller adds W to the tile while it is in the first-level cache.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>

#include "rank_tile_amx.h"
#include "scratch.h"
#include "vec.h"

namespace lora_fast {

using torch::headeronly::ScalarType;

// Runs the statement with T bound to the storage type of dtype.
#define LORA_FAST_BY_DTYPE(dtype, T, ...)           \
  switch (dtype) {                                  \
    case torch::headeronly::ScalarType::Double: {   \
      using T = double;                             \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case torch::headeronly::ScalarType::BFloat16: { \
      using T = bf16;                               \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case torch::headeronly::ScalarType::Half: {     \
      using T = f16;                                \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    default: {                                      \
      using T = float;                              \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
  }

// A factor of the product: element (o, r) lies at data + o * stride_outer + r * stride_rank; o counts
// rows of P or columns of Q.
struct Factor {
  const void* data;
  ScalarType dtype;
  int64_t stride_outer, stride_rank;
};

// How P and Q are packed.
//   vectors: P [rows][depth], Q panel [depth][kTileCols], of float or double; depth = R
//   AMX:     P [rows][depth], Q panel [kTileCols / 16][depth / 2][16][2] of bfloat16; depth = steps · step ≥
//   R
struct RankLayout {
  RankLayout(int64_t rank, bool use_amx)
      : rank(rank),
        amx(use_amx && rank > 0),
        steps(amx ? (rank + 31) / 32 : 1),
        step(amx ? (rank + 2 * steps - 1) / (2 * steps) * 2 : rank),
        depth(steps * step) {}
  int64_t rank;
  bool amx;
  int64_t steps, step, depth;
};

inline bool use_amx(const Factor& p, const Factor& q, bool wide) {
  return !wide && p.dtype == ScalarType::BFloat16 && q.dtype == ScalarType::BFloat16 && amx_enabled();
}

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// F: what a packed element is computed in.
template <class Out>
using Compute = std::conditional_t<sizeof(Out) == 8, double, float>;

// dst[0..n) = src[0], src[stride], ...
template <class Out, class In>
LORA_FAST_INLINE void convert_line(Out* dst, const In* src, int64_t stride, int64_t n) {
  using F = Compute<Out>;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = std::min(kLanes, n - i);
    if (stride == 1) {
      store_n<F>(dst + i, load_n<F>(src + i, count), count);
    } else {
      In part[kLanes] = {};
      for (int64_t l = 0; l < count; ++l) part[l] = src[(i + l) * stride];
      store_n<F>(dst + i, load<F>(part), count);
    }
  }
}

// dst [rows][depth] from rows first .. first + rows of the factor; columns past its rank are zero.
template <class Out, class In>
LORA_FAST_INLINE void pack_rows(Out* dst, const Factor& f, int64_t rank, int64_t depth, int64_t first,
                                int64_t rows) {
  const In* src = static_cast<const In*>(f.data) + first * f.stride_outer;
  for (int64_t o = 0; o < rows; ++o, src += f.stride_outer, dst += depth) {
    convert_line(dst, src, f.stride_rank, rank);
    std::fill(dst + rank, dst + depth, Out{});
  }
}

// dst [rank][kTileCols] from columns first .. first + cols of the factor; columns past cols are zero.
template <class F, class In>
LORA_FAST_INLINE void pack_panel(F* dst, const Factor& f, int64_t rank, int64_t first, int64_t cols) {
  const In* src = static_cast<const In*>(f.data) + first * f.stride_outer;
  if (f.stride_outer == 1 || cols == 1) {
    for (int64_t r = 0; r < rank; ++r) {
      convert_line(dst + r * kTileCols, src + r * f.stride_rank, 1, cols);
      std::fill(dst + r * kTileCols + cols, dst + (r + 1) * kTileCols, F{});
    }
    return;
  }
  constexpr int64_t kPart = 64;
  F line[kPart];
  for (int64_t r0 = 0; r0 < rank; r0 += kPart) {
    const int64_t count = std::min(kPart, rank - r0);
    for (int64_t o = 0; o < kTileCols; ++o) {
      if (o < cols) {
        convert_line(line, src + o * f.stride_outer + r0 * f.stride_rank, f.stride_rank, count);
      } else {
        std::fill(line, line + count, F{});
      }
      for (int64_t r = 0; r < count; ++r) dst[(r0 + r) * kTileCols + o] = line[r];
    }
  }
}

// The same for AMX: dst [kTileCols / 16][depth / 2][16][2].
LORA_FAST_INLINE void pack_panel_pairs(bf16* dst, const Factor& f, int64_t rank, int64_t depth, int64_t first,
                                       int64_t cols) {
  const bf16* src = static_cast<const bf16*>(f.data) + first * f.stride_outer;
  uint16_t* out = reinterpret_cast<uint16_t*>(dst);
  for (int64_t g = 0; g * kLanes < cols; ++g, out += depth * kLanes) {
    const bf16* group = src + g * kLanes * f.stride_outer;
    const int64_t count = std::min(kLanes, cols - g * kLanes);
    const bool whole = count == kLanes && rank == depth;
    if (!whole) std::memset(out, 0, static_cast<size_t>(depth * kLanes) * sizeof(bf16));
    if (whole && f.stride_outer == 1) {
      for (int64_t r = 0; r < rank; r += 2) {
        const u16x16 even = load_bits<u16x16>(group + r * f.stride_rank);
        const u16x16 odd = load_bits<u16x16>(group + (r + 1) * f.stride_rank);
        store_bits(out + r * kLanes,
                   __builtin_convertvector(even, u32x16) | (__builtin_convertvector(odd, u32x16) << 16));
      }
    } else if (whole && f.stride_rank == 1) {
      for (int64_t o = 0; o < kLanes; ++o) {
        for (int64_t r = 0; r < rank; r += 2) {
          std::memcpy(out + r * kLanes + 2 * o, group + o * f.stride_outer + r, 4);
        }
      }
    } else {
      for (int64_t o = 0; o < count; ++o) {
        for (int64_t r = 0; r < rank; ++r) {
          out[(r / 2 * kLanes + o) * 2 + r % 2] = group[o * f.stride_outer + r * f.stride_rank].bits;
        }
      }
    }
  }
}

// C[m × n] (+)= A[m × k] B[k × n]; A's strides are free (a transposed A costs nothing), n is a multiple of
// kLanes. The sums over k are made in registers before they are added to C.
void gemm_tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate);
void gemm_tile(const double* a, int64_t a_row, int64_t a_col, const double* b, int64_t ldb, double* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate);

// c [rows][kTileCols] = P Q for packed rows of P and one packed panel of Q; columns past cols, rounded up to
// kLanes, are not written.
template <class F>
LORA_FAST_INLINE void rank_tile(const RankLayout& layout, const void* p, const void* panel, F* c,
                                int64_t rows, int64_t cols) {
  if constexpr (sizeof(F) == 4) {
    if (layout.amx) {
      amx_rank_tile(static_cast<const bf16*>(p), static_cast<const bf16*>(panel), layout.steps, layout.step,
                    c, rows, cols);
      return;
    }
  }
  gemm_tile(static_cast<const F*>(p), layout.depth, 1, static_cast<const F*>(panel), kTileCols, c, kTileCols,
            rows, round_up(cols, kLanes), layout.depth, false);
}

}  // namespace lora_fast
