// V[rows × cols] = W + s P Q, transposed where that makes W's columns adjacent in memory:
//   W as it is:    P = lora_B [N, R], Q = lora_A [R, K]
//   W transposed:  P = lora_Aᵀ [K, R], Q = lora_Bᵀ [R, N]
#pragma once

#include "../checks.h"
#include "packed.h"

namespace lora_fast {

inline Factor factor_of(const Tensor& t, int64_t outer_dim) {
  return {t.const_data_ptr(), t.scalar_type(), t.stride(outer_dim), t.stride(1 - outer_dim)};
}

inline bool is_double(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double;
}

struct AdaptedWeight {
  AdaptedWeight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling)
      : data(const_cast<void*>(weight.const_data_ptr())),
        dtype(weight.scalar_type()),
        transposed(weight.stride(1) != 1 && weight.size(1) != 1 &&
                   (weight.stride(0) == 1 || weight.size(0) == 1)),
        rows(weight.size(transposed ? 1 : 0)),
        cols(weight.size(transposed ? 0 : 1)),
        row_stride(weight.stride(transposed ? 1 : 0)),
        col_stride(cols == 1 ? 1 : weight.stride(transposed ? 0 : 1)),
        rank(lora_A.size(0)),
        p(transposed ? factor_of(lora_A, 1) : factor_of(lora_B, 0)),
        q(transposed ? factor_of(lora_B, 0) : factor_of(lora_A, 1)),
        scaling(scaling),
        wide(is_double(weight) || is_double(lora_A) || is_double(lora_B)) {}

  void* data;
  ScalarType dtype;
  bool transposed;
  int64_t rows, cols, row_stride, col_stride, rank;
  Factor p, q;
  double scaling;
  bool wide;  // computed in double
};

// Its factors, packed.
struct PackedAdapter {
  explicit PackedAdapter(const AdaptedWeight& v)
      : layout(v.rank, use_amx(v.p, v.q, v.wide), is_dealt(v.dtype)),
        p(v.p, v.rows, layout, v.wide),
        q(v.q, v.cols, layout, v.wide) {}
  RankLayout layout;
  PackedRows p;
  PackedPanels q;
};

template <class T>
struct WeightTile {
  T* data;
  int64_t stride;
};

// The tile of W at (i, j): in place where its columns are adjacent, gathered into buffer otherwise.
template <class T>
LORA_FAST_INLINE WeightTile<T> weight_tile(const AdaptedWeight& v, int64_t i, int64_t j, int64_t rows,
                                           int64_t cols, T* buffer) {
  T* w = static_cast<T*>(v.data) + i * v.row_stride + j * v.col_stride;
  if (v.col_stride == 1) return {w, v.row_stride};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) buffer[r * kTileCols + c] = w[r * v.row_stride + c * v.col_stride];
  }
  return {buffer, kTileCols};
}

}  // namespace lora_fast
