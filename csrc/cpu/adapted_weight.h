// V[rows × cols] = W + s P Q, transposed where that makes W's columns adjacent in memory:
//   W as it is:    P = lora_B [N, R], Q = lora_A [R, K]
//   W transposed:  P = lora_Aᵀ [K, R], Q = lora_Bᵀ [R, N]
#pragma once

#include "../checks.h"
#include "packed.h"
#include "parallel.h"

namespace lora_fast {

inline Factor factor_of(const Tensor& t, int64_t outer_dim) {
  return {t.const_data_ptr(), t.scalar_type(), t.stride(outer_dim), t.stride(1 - outer_dim)};
}

inline bool is_double(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double;
}

// V but for W
struct RankUpdate {
  RankUpdate(const Tensor& lora_A, const Tensor& lora_B, double scaling, bool transposed)
      : rows(transposed ? lora_A.size(1) : lora_B.size(0)),
        cols(transposed ? lora_B.size(0) : lora_A.size(1)),
        rank(lora_A.size(0)),
        p(transposed ? factor_of(lora_A, 1) : factor_of(lora_B, 0)),
        q(transposed ? factor_of(lora_B, 0) : factor_of(lora_A, 1)),
        scaling(scaling),
        wide(is_double(lora_A) || is_double(lora_B)) {}

  int64_t rows, cols, rank;
  Factor p, q;
  double scaling;
  bool wide;  // computed in double
};

// V of a W that lies in memory
struct AdaptedWeight : RankUpdate {
  AdaptedWeight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling)
      : RankUpdate(lora_A, lora_B, scaling, is_transposed(weight)),
        data(const_cast<void*>(weight.const_data_ptr())),
        dtype(weight.scalar_type()),
        transposed(is_transposed(weight)),
        row_stride(weight.stride(transposed ? 1 : 0)),
        col_stride(cols == 1 ? 1 : weight.stride(transposed ? 0 : 1)) {
    wide = wide || is_double(weight);
  }

  static bool is_transposed(const Tensor& weight) {
    return weight.stride(1) != 1 && weight.size(1) != 1 && (weight.stride(0) == 1 || weight.size(0) == 1);
  }

  void* data;
  ScalarType dtype;
  bool transposed;
  int64_t row_stride, col_stride;
};

// Its factors, packed.
struct PackedAdapter {
  explicit PackedAdapter(const AdaptedWeight& v) : PackedAdapter(v, is_dealt(v.dtype)) {}
  PackedAdapter(const RankUpdate& v, bool dealt)
      : layout(v.rank, use_pairs(v.p, v.q, v.wide), dealt),
        p(v.p, v.rows, layout, v.wide),
        q(v.q, v.cols, layout, v.wide) {}
  RankLayout layout;
  PackedRows p;
  PackedPanels q;
};

// A range of V's tiles: blocks of kTileRows rows by blocks of kTileCols columns, end excluded; a tile has
// `rows` of a block's rows, a divisor of kTileRows.
struct TileRange {
  int64_t row_begin, row_end, col_begin, col_end;
  int64_t rows = kTileRows;
};

inline int64_t row_blocks(const RankUpdate& v) {
  return round_up(v.rows, kTileRows) / kTileRows;
}
inline int64_t col_blocks(const RankUpdate& v) {
  return round_up(v.cols, kTileCols) / kTileCols;
}

// Into how many chunks the row blocks are divided, by what is worth a thread.
inline int64_t row_chunks(const RankUpdate& v, int64_t least_elements) {
  return chunk_count(row_blocks(v), std::max<int64_t>(1, least_elements / (kTileRows * v.cols)));
}

// The `half` 0 or 1 of the next tile's part of a row, into the second-level cache (rows of a power of two
// apart share few sets of the first): more rows are read side by side than the processor's own prefetcher
// follows.
template <int half, class T>
LORA_FAST_INLINE void fetch_next(const T* w) {
  constexpr int64_t kHalf = kTileCols / 2, kLine = 64 / sizeof(T);
#pragma GCC unroll 8
  for (int64_t k = half * kHalf; k < (half + 1) * kHalf; k += kLine)
    __builtin_prefetch(w + kTileCols + k, 0, 2);
}

// V at (i, j): W's elements, in place where they are adjacent in whole strips and else gathered, zero to the
// end of their strip, and P Q's, as far.
template <class F, class T>
struct AdaptedTile {
  int64_t i, j, rows, cols;
  Vec<F> scaling;
  T* w;
  int64_t stride;  // of w
  bool gathered;
  F* update;          // [rows][kTileCols], in the order of strips; the caller's to write over
  bool half_fetched;  // of the next tile

  // the rest of the next tile's part of row r
  LORA_FAST_INLINE void fetch(int64_t r) const {
    if (!half_fetched) fetch_next<0>(w + r * stride);
    fetch_next<1>(w + r * stride);
  }

  // the strip of V at column k of row r
  LORA_FAST_INLINE Strip<F> strip(int64_t r, int64_t k) const {
    const Strip<F> x = load_strip<F>(w + r * stride + k), u = load_packed(update + r * kTileCols + k);
    return {x.even + scaling * u.even, x.odd + scaling * u.odd};
  }
};

// to[0], to[to_stride], ... = from[0], from[from_stride], ...
template <class T>
LORA_FAST_INLINE void copy_line(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < n; ++k) to[k * to_stride] = from[k * from_stride];
}

// Rows of a tile in a pass that does little beside reading W: the fewer they are, the more evenly the next
// tile is fetched beside the arithmetic. The norm and the merge take 0.7 to 0.9 of the time for it with
// AVX-512, and 1.1 with AVX2, where the arithmetic takes longer than the reading. AMX takes sixteen rows or
// more.
inline int64_t few_tile_rows(const RankLayout& layout) {
  const bool on_amx = layout.pairs && amx_enabled();
  return has_avx512_vectors() && !on_amx ? 8 : kTileRows;
}

struct TilePlace {
  int64_t i, j, rows, cols;
};

// f(place, update) for each tile of the range, update being P Q there [rows][kTileCols]: all columns of a
// block of rows before the next block. before(place) comes ahead of the product. Both are compiled for the
// caller's instruction set: always inline.
template <class F, class Before, class Function>
LORA_FAST_INLINE void for_each_update(const RankUpdate& v, const PackedAdapter& adapter,
                                      const TileRange& range, const Before& before, const Function& f) {
  alignas(64) F update[kTileRows * kTileCols];
  for (int64_t block = range.row_begin * kTileRows; block < std::min(v.rows, range.row_end * kTileRows);
       block += kTileRows) {
    for (int64_t j = range.col_begin * kTileCols; j < std::min(v.cols, range.col_end * kTileCols);
         j += kTileCols) {
      const int64_t cols = std::min(kTileCols, v.cols - j);
      for (int64_t i = block; i < std::min(v.rows, block + kTileRows); i += range.rows) {
        const TilePlace place{i, j, std::min(range.rows, v.rows - i), cols};
        before(place);
        rank_tile(adapter.layout, adapter.p.at(i), adapter.q.at(j), update, place.rows, cols);
        f(place, update);
      }
    }
  }
}

// f(tile) for each of the range, in that order; f is always inline too. Where it calls tile.fetch beside each
// row, the next tile is fetched, half of it here before the product if tiles have few rows.
template <class F, class T, class Function>
LORA_FAST_INLINE void for_each_tile(const AdaptedWeight& v, const PackedAdapter& adapter,
                                    const TileRange& range, const Function& f) {
  alignas(64) T gathered[kTileRows * kTileCols];
  const Vec<F> scaling = splat(static_cast<F>(v.scaling));
  const bool half_first = range.rows < kTileRows;
  const auto at = [&](const TilePlace& place) LORA_FAST_ALWAYS_INLINE {
    return static_cast<T*>(v.data) + place.i * v.row_stride + place.j * v.col_stride;
  };
  const auto before = [&](const TilePlace& place) LORA_FAST_ALWAYS_INLINE {
    T* w = at(place);
    for (int64_t r = 0; half_first && r < place.rows; ++r) fetch_next<0>(w + r * v.row_stride);
  };
  for_each_update<F>(v, adapter, range, before,
                     [&](const TilePlace& place, F* update) LORA_FAST_ALWAYS_INLINE {
                       const auto [i, j, rows, cols] = place;
                       T* w = at(place);
                       int64_t stride = v.row_stride;
                       const bool gather = v.col_stride != 1 || cols % kStrip != 0;
                       if (gather) {
                         for (int64_t r = 0; r < rows; ++r) {
                           T* line = gathered + r * kTileCols;
                           std::fill(line + cols / kStrip * kStrip, line + round_up(cols, kStrip), T{});
                           copy_line(line, 1, w + r * v.row_stride, v.col_stride, cols);
                         }
                         w = gathered;
                         stride = kTileCols;
                       }
                       f(AdaptedTile<F, T>{i, j, rows, cols, scaling, w, stride, gather, update, half_first});
                     });
}

}  // namespace lora_fast
