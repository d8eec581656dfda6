// out = gain ⊙ v + bias, v = base + s h lora_Bᵀ, each element read and rounded once; product = v. With W for
// base, lora_B for h and lora_Aᵀ for lora_B it merges an adapter into W.
#pragma once

#include <lora_fast/gain.cuh>
#include <lora_fast/rank_tile.cuh>

namespace lora_fast::cuda {

template <class T>
struct Compose {
  Matrix<const T> base;
  RankProduct product;
  Gain gain;  // of columns, or with gain_per_row of rows
  bool gain_per_row;
  const void* bias;  // [cols], or null
  Dtype bias_dtype;
  Matrix<T> out;   // may be base
  Matrix<T> kept;  // v; data null where it is not kept
  int per_walk;    // tiles
};

template <class T, class E, bool p_across, bool q_across>
LORA_FAST_KERNEL(kTileThreads, 2)
lora_compose_fwd_kernel(Compose<T> op) {
  using Part = Fragment<T>;
  const RankProduct& product = op.product;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * op.per_walk;
  const int64_t left = divide_up(product.cols, kTileCols<T>) - first;
  const TileWalk walk{static_cast<int64_t>(blockIdx.x) * kTileRows, first * kTileCols<T>,
                      static_cast<int>(left < op.per_walk ? left : op.per_walk), false};

  float* gains =
      reinterpret_cast<float*>(shared_memory() + kTileMemory<T, E>);  // of the tile's columns or rows
  float* biases = gains + kTileRows;
  for_each_tile<T, E, p_across, q_across>(
      op.base, product, walk, [&](Part& c, T* tile, int64_t row, int64_t col) {
        if (threadIdx.x < kTileRows) {
          const int64_t line = (op.gain_per_row ? row : col) + threadIdx.x, at = col + threadIdx.x;
          const bool inside = line < (op.gain_per_row ? product.rows : product.cols);
          gains[threadIdx.x] = inside ? gain_at(op.gain, line) : 1;
          biases[threadIdx.x] =
              op.bias != nullptr && at < product.cols ? element(op.bias, op.bias_dtype, at) : 0;
        }
        // tile: base, then v where it is kept, then out; a lane touches its own elements only
        Part::for_each([&](int i, int half, int j, int e) {
          T& own = tile[Part::place(i, half, j, e)];
          float& v = c.at[i][j][2 * half + e];
          v = widen(own) + product.scaling * v;
          if (op.kept.data != nullptr) own = rounded<T>(v);
        });
        __syncthreads();
        if (op.kept.data != nullptr) {
          store_tile(tile, op.kept, product.rows, product.cols, row, col);
          __syncthreads();
        }
        Part::for_each([&](int i, int half, int j, int e) {
          const int at = Part::col(j) + e;
          const float gain = gains[op.gain_per_row ? Part::row(i, half) : at];
          tile[Part::place(i, half, j, e)] = rounded<T>(gain * c.at[i][j][2 * half + e] + biases[at]);
        });
        __syncthreads();
        store_tile(tile, op.out, product.rows, product.cols, row, col);
      });
}

// base, out, kept [T, N]; h [T, R], lora_B [N, R]. E: float, or what both factors are.
template <class T, class E>
cudaError_t lora_compose_fwd(const Operand& base, const Operand& h, const Operand& lora_B, float scaling,
                             const Gain& gain, bool gain_per_row, const void* bias, Dtype bias_dtype,
                             const Operand& out, const Operand& kept, cudaStream_t stream) {
  int multiprocessors = 0;
  if (const cudaError_t error = current_device(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  const bool q_across = is_transposed(lora_B), p_across = !q_across && is_transposed(h);
  const int64_t strips = divide_up(base.rows, kTileRows), tiles = divide_up(base.cols, kTileCols<T>);
  const int64_t splits = plan_splits(strips, tiles, 2 * multiprocessors, tiles);
  Compose<T> op{
      matrix_of<const T>(base),
      {base.rows, base.cols, h.cols, factor_of<E>(h, p_across), factor_of<E>(lora_B, q_across), scaling},
      gain,
      gain_per_row,
      bias,
      bias_dtype,
      matrix_of<T>(out),
      matrix_of<T>(kept),
      static_cast<int>(divide_up(tiles, splits))};
  auto kernel = lora_compose_fwd_kernel<T, E, false, false>;
  if constexpr (FactorTile<E>::kTensorCores) {
    if (p_across) kernel = lora_compose_fwd_kernel<T, E, true, false>;
    if (q_across) kernel = lora_compose_fwd_kernel<T, E, false, true>;
  }
  const dim3 grid(strips, divide_up(tiles, op.per_walk));
  return launch(kernel, grid, kTileThreads, kTileMemory<T, E> + 2 * kTileRows * sizeof(float), false, stream,
                op);
}

}  // namespace lora_fast::cuda
