// The primitive that every kernel shares: one tile of the rank-R product,
//   C[rows × cols] = P[rows × R] · Q[R × cols],   rows ≤ kTileRows, cols ≤ kTileCols,
// from packed P and Q. Two ways: float or double vectors, and for bfloat16 factors the pairwise products of
// AMX or AVX512-BF16 (exact, accumulated in float32). The caller adds W to the tile while it is in the
// first-level cache.
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
//   pairs:   P [rows][depth], Q panel [kTileCols / 16][depth / 2][16][2] of bfloat16; depth = steps · step ≥
//   R
struct RankLayout {
  RankLayout(int64_t rank, bool in_pairs, bool dealt)
      : rank(rank),
        dealt(dealt),
        pairs(in_pairs && rank > 0),
        steps(pairs ? (rank + 31) / 32 : 1),
        step(pairs ? (rank + 2 * steps - 1) / (2 * steps) * 2 : rank),
        depth(steps * step) {}
  int64_t rank;
  bool dealt;  // Q's columns are de-interleaved as those of a 16-bit W are, see Strip
  bool pairs;
  int64_t steps, step, depth;
};

inline bool use_pairs(const Factor& p, const Factor& q, bool wide) {
  return !wide && p.dtype == ScalarType::BFloat16 && q.dtype == ScalarType::BFloat16 &&
         (amx_enabled() || avx512_bf16_enabled());
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
    if (stride == 1 && count == kLanes) {
      store<F>(dst + i, load<F>(src + i));
      continue;
    }
    In in[kLanes] = {};
    Out out[kLanes];
    for (int64_t l = 0; l < count; ++l) in[l] = src[(i + l) * stride];
    store<F>(out, load<F>(in));
    std::memcpy(dst + i, out, static_cast<size_t>(count) * sizeof(Out));
  }
}

// A line of whole strips from the order of its columns to that of strips.
template <class F>
LORA_FAST_INLINE void deal(F* line, int64_t count) {
  for (; count > 0; count -= kStrip, line += kStrip) {
    Strip<F> strip = load_packed(line);
    deal_strip(strip.even, strip.odd);
    store_packed(line, strip);
  }
}

// dst [rows][depth] from rows first .. first + rows of the factor; columns past its rank are zero.
template <class Out, class In>
LORA_FAST_INLINE void pack_rows(Out* dst, const Factor& f, const RankLayout& layout, int64_t first,
                                int64_t rows) {
  const In* src = static_cast<const In*>(f.data) + first * f.stride_outer;
  for (int64_t o = 0; o < rows; ++o, src += f.stride_outer, dst += layout.depth) {
    convert_line(dst, src, f.stride_rank, layout.rank);
    std::fill(dst + layout.rank, dst + layout.depth, Out{});
  }
}

// dst [rank][kTileCols] from columns first .. first + cols of the factor; columns past cols are zero.
template <class F, class In>
LORA_FAST_INLINE void pack_panel(F* dst, const Factor& f, const RankLayout& layout, int64_t first,
                                 int64_t cols) {
  const In* src = static_cast<const In*>(f.data) + first * f.stride_outer;
  if (f.stride_outer == 1) {
    for (int64_t r = 0; r < layout.rank; ++r) {
      F* line = dst + r * kTileCols;
      convert_line(line, src + r * f.stride_rank, 1, cols);
      std::fill(line + cols, line + kTileCols, F{});
    }
    if (layout.dealt) deal(dst, layout.rank * kTileCols);
    return;
  }
  for (int64_t o = 0; o < kTileCols; o += kLanes) {
    const In* rows = src + o * f.stride_outer;
    int64_t r = 0;
    if constexpr (sizeof(F) == 4 && sizeof(In) <= 4) {
      constexpr int64_t kBlock = 8 * 4 / sizeof(In);
      if (f.stride_rank == 1 && o + kLanes <= cols) {
        for (; r + kBlock <= layout.rank; r += kBlock) {
          u32x16 words[8];
          transpose_words(rows + r, f.stride_outer * static_cast<int64_t>(sizeof(In)), words);
          for (int64_t w = 0; w < 8; ++w) {
            F* out = dst + o + (r + w * kBlock / 8) * kTileCols;
            if constexpr (sizeof(In) == 2) {
              store<F>(out, widen(words[w] & 0xffffu, In{}));
              store<F>(out + kTileCols, widen(words[w] >> 16, In{}));
            } else {
              store_bits(out, words[w]);
            }
          }
        }
      }
    }
    for (; r < layout.rank; ++r) {
      F* out = dst + o + r * kTileCols;
      const int64_t count = std::max<int64_t>(0, std::min(kLanes, cols - o));
      convert_line(out, rows + r * f.stride_rank, f.stride_outer, count);
      std::fill(out + count, out + kLanes, F{});
    }
  }
  if (layout.dealt) deal(dst, layout.rank * kTileCols);
}

// The same in pairs: dst [kTileCols / 16][depth / 2][16][2]; whole strips of columns are written.
LORA_FAST_INLINE void pack_panel_pairs(bf16* dst, const Factor& f, const RankLayout& layout, int64_t first,
                                       int64_t cols) {
  const int64_t rank = layout.rank, group = layout.depth * kLanes;  // elements of 16 columns
  uint16_t* out = reinterpret_cast<uint16_t*>(dst);
  for (int64_t j = 0; j < cols; j += kStrip, out += 2 * group) {
    const bf16* src = static_cast<const bf16*>(f.data) + (first + j) * f.stride_outer;
    const int64_t count = std::min(kStrip, cols - j);
    const bool whole = count == kStrip && rank == layout.depth && layout.dealt;
    if (whole && f.stride_outer == 1) {
      for (int64_t r = 0; r < rank; r += 2) {
        store_pairs(load_bits<u32x16>(src + r * f.stride_rank),
                    load_bits<u32x16>(src + (r + 1) * f.stride_rank), out + r * kLanes,
                    out + group + r * kLanes);
      }
    } else if (whole && f.stride_rank == 1 && rank % 16 == 0) {
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t r = 0; r < rank; r += 16) {
          u32x16 pairs[8];
          transpose_words(src + half * f.stride_outer + r, 4 * f.stride_outer, pairs);
          for (int64_t p = 0; p < 8; ++p) store_bits(out + half * group + r * kLanes + p * kStrip, pairs[p]);
        }
      }
    } else {
      std::memset(out, 0, static_cast<size_t>(2 * group) * sizeof(bf16));
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = layout.dealt ? dealt_position(c) : c;
        uint16_t* to = out + at / kLanes * group + at % kLanes * 2;
        for (int64_t r = 0; r < rank; ++r)
          to[r / 2 * kStrip + r % 2] = src[c * f.stride_outer + r * f.stride_rank].bits;
      }
    }
  }
}

// C[m × n] (+)= A[m × k] B[k × n]; A's strides are free (a transposed A costs nothing), n is a multiple of
// kLanes. The sums over k are made in registers, in stretches, before they are added to C.
void gemm_tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate);
void gemm_tile(const double* a, int64_t a_row, int64_t a_col, const double* b, int64_t ldb, double* c,
               int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate);

// c [rows][kTileCols] = P Q for packed rows of P and one packed panel of Q. Columns past cols are zero to the
// end of their strip, whatever P holds, and not written beyond it.
template <class F>
LORA_FAST_INLINE void rank_tile(const RankLayout& layout, const void* p, const void* panel, F* c,
                                int64_t rows, int64_t cols) {
  const int64_t written = round_up(cols, kStrip);
  bool done = false;
  if constexpr (sizeof(F) == 4) {
    if (layout.pairs) {
      const auto tile = amx_enabled() ? amx_rank_tile : avx512_bf16_rank_tile;
      tile(static_cast<const bf16*>(p), static_cast<const bf16*>(panel), layout.steps, layout.step, c, rows,
           written);
      done = true;
    }
  }
  if (!done) {
    gemm_tile(static_cast<const F*>(p), layout.depth, 1, static_cast<const F*>(panel), kTileCols, c,
              kTileCols, rows, written, layout.depth, false);
  }
  for (int64_t j = cols; j < written; ++j) {
    const int64_t at = layout.dealt ? dealt_position(j) : j;
    for (int64_t r = 0; r < rows; ++r) c[r * kTileCols + at] = 0;
  }
}

}  // namespace lora_fast
