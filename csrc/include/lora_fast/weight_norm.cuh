// n = ‖W + s B A‖ by rows or by columns, the direct sum: W is read once, only sums of squares leave the
// tiles.
//
//   1. weight_norm_tiles   each block walks tiles of one strip and writes the strip's sums of squares,
//   [splits, lines]
//   2. weight_norm_finish  adds the splits, takes the root; lines whose sum left float32's safe range are
//   summed again
//                          in double
//
// With a kept norm (`Kept`), the key that content_key.cuh has hashed is compared first, on the device:
// unchanged, both kernels leave early and the kept norm is copied. It is written before its key.
#pragma once

#include <lora_fast/content_key.cuh>
#include <lora_fast/rank_tile.cuh>

namespace lora_fast::cuda {

// W as base [rows, cols], transposed if that makes its columns adjacent; B A as P Qᵀ.
template <class T>
struct WeightNorm {
  Matrix<const T> weight;
  RankProduct product;
  int64_t lines, length;     // of V, whose norms are taken
  int64_t splits, per_walk;  // walks of each line, tiles of each walk
  float* partial;            // [splits, lines]
  float* norm;               // [lines]
  Kept kept;
};

constexpr int kFinishThreads = 256, kFinishLines = 32;

// transposed: of P and Q, P is lora_A, whose ranks are rows
template <class T, class E, bool by_rows, bool transposed>
LORA_FAST_KERNEL(kTileThreads, 2)
weight_norm_tiles(WeightNorm<T> op) {
  using Part = Fragment<T>;
  constexpr int kSums = by_rows ? 2 * Part::kRowBlocks : 2 * Part::kColBlocks;
  constexpr int kLines = by_rows ? kTileRows : kTileCols<T>;
  if (op.kept.norm != nullptr && !begin_kept(op.kept, kTileThreads)) return;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kLines, first = blockIdx.y * op.per_walk;
  const int64_t left = divide_up(op.length, by_rows ? kTileCols<T> : kTileRows) - first;
  const TileWalk walk{by_rows ? strip : first * kTileRows, by_rows ? first * kTileCols<T> : strip,
                      static_cast<int>(left < op.per_walk ? left : op.per_walk), !by_rows};

  float sums[kSums] = {};
  for_each_tile<T, E, transposed, !transposed>(
      op.weight, op.product, walk, [&](const Part& c, const T* tile, int64_t, int64_t) {
        float own[kSums] =
            {};  // apart from the total, so that its rounding errors stay those of few additions
        Part::for_each([&](int i, int half, int j, int e) {
          const float v =
              widen(tile[Part::place(i, half, j, e)]) + op.product.scaling * c.at[i][j][2 * half + e];
          own[by_rows ? 2 * i + half : 2 * j + e] += v * v;
        });
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] += own[k];
      });

  // The lanes that share a line, then the warps.
  float* shared = reinterpret_cast<float*>(shared_memory());
  constexpr int kWarps = by_rows ? 2 : 4;  // along a line
  const int warp = by_rows ? threadIdx.x / 32 % 2 : threadIdx.x / 64;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    for (int lanes = by_rows ? 1 : 4; lanes <= (by_rows ? 2 : 16); lanes *= 2)
      sums[k] += __shfl_xor_sync(0xFFFFFFFFu, sums[k], lanes);
    const int line = by_rows ? Part::row(k / 2, k % 2) : Part::col(k / 2) + k % 2;
    const bool writes = by_rows ? Part::lane() % 4 == 0 : Part::lane() < 4;
    if (writes) shared[warp * kLines + line] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x < kLines && strip + threadIdx.x < op.lines) {
    float total = 0;
    for (int k = 0; k < kWarps; ++k) total += shared[k * kLines + threadIdx.x];
    op.partial[blockIdx.y * op.lines + strip + threadIdx.x] = total;
  }
}

// Σ v² over one line of V, in double by the whole block.
template <class T>
__device__ double squares_of_line(const WeightNorm<T>& op, bool by_rows, int64_t line, double* shared) {
  const RankProduct& product = op.product;
  const Factor &one = by_rows ? product.p : product.q, &all = by_rows ? product.q : product.p;
  double squares = 0;
  for (int64_t k = threadIdx.x; k < op.length; k += kFinishThreads) {
    double update = 0;
    for (int64_t r = 0; r < product.rank; ++r) {
      const double x = element(one.data, one.dtype, line * one.stride_outer + r * one.stride_rank);
      update += x * element(all.data, all.dtype, k * all.stride_outer + r * all.stride_rank);
    }
    const int64_t row = by_rows ? line : k, col = by_rows ? k : line;
    const double w = widen(op.weight.data[row * op.weight.row_stride + col * op.weight.col_stride]);
    const double v = w + product.scaling * update;
    squares += v * v;
  }
  return sum_of_block(squares, shared, kFinishThreads);
}

template <class T, bool by_rows>
LORA_FAST_KERNEL(kFinishThreads, 2)
weight_norm_finish(WeightNorm<T> op) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishLines, line = first + threadIdx.x;
  const bool mine = threadIdx.x < kFinishLines && line < op.lines;
  const bool keeps = op.kept.norm != nullptr;
  if (keeps && op.kept.state->changed == 0) {
    if (mine) op.norm[line] = op.kept.norm[line];
    return;
  }
  const auto write = [&](int64_t at, double squares) {
    const float norm = static_cast<float>(sqrt(squares));
    op.norm[at] = norm;
    if (keeps) op.kept.norm[at] = norm;
  };
  double* shared = reinterpret_cast<double*>(shared_memory());
  int* again = reinterpret_cast<int*>(shared + kFinishThreads / 32);
  if (threadIdx.x < kFinishLines) {
    double squares = 0;
    for (int64_t split = 0; mine && split < op.splits; ++split)
      squares += op.partial[split * op.lines + line];
    // Inside, no square has under- or overflowed that could be seen in the result; NaN is outside.
    const bool safe = squares >= 1e-24 && squares <= 1e36;
    again[threadIdx.x] = mine && !safe;
    if (mine && safe) write(line, squares);
  }
  __syncthreads();
  for (int k = 0; k < kFinishLines; ++k) {
    if (again[k] == 0) continue;
    const double squares = squares_of_line(op, by_rows, first + k, shared);
    if (threadIdx.x == 0) write(first + k, squares);
  }
  if (keeps) finish_kept(op.kept);
}

// weight [N, K], lora_A [R, K], lora_B [N, R]. E: float, or what both factors are. Everything but the
// buffers.
template <class T, class E>
cudaError_t plan_weight_norm(const Operand& weight, const Operand& lora_A, const Operand& lora_B,
                             float scaling, bool per_output, WeightNorm<T>* op) {
  int multiprocessors = 0;
  if (const cudaError_t error = current_device(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  const bool transposed = is_transposed(weight);
  op->weight = matrix_of<const T>(transposed ? weight.transposed() : weight);
  op->product = {transposed ? weight.cols : weight.rows,
                 transposed ? weight.rows : weight.cols,
                 lora_A.rows,
                 transposed ? factor_of<E>(lora_A.transposed(), true) : factor_of<E>(lora_B, false),
                 transposed ? factor_of<E>(lora_B, false) : factor_of<E>(lora_A.transposed(), true),
                 scaling};
  const bool by_rows = per_output != transposed;
  op->lines = by_rows ? op->product.rows : op->product.cols;
  op->length = by_rows ? op->product.cols : op->product.rows;
  const int64_t strips = divide_up(op->lines, by_rows ? kTileRows : kTileCols<T>);
  const int64_t tiles = divide_up(op->length, by_rows ? kTileCols<T> : kTileRows);
  // the partial sums stay under 1 MiB, and under 1/64 of W
  const int64_t most = op->lines * tiles <= (int64_t{1} << 18) ? tiles : (int64_t{1} << 18) / op->lines;
  op->splits = plan_splits(strips, tiles, 2 * multiprocessors, most < 1 ? 1 : most);
  op->per_walk = divide_up(tiles, op->splits);
  op->splits = divide_up(tiles, op->per_walk);
  return cudaSuccess;
}

template <class T, class E>
cudaError_t weight_norm(const WeightNorm<T>& op, bool per_output, bool transposed, cudaStream_t stream) {
  const bool by_rows = per_output != transposed;
  const int64_t strips = divide_up(op.lines, by_rows ? kTileRows : kTileCols<T>);
  constexpr bool kEither =
      FactorTile<E>::kTensorCores;  // float factors are laid out anew, whichever is which
  const auto tiles =
      by_rows
          ? (transposed ? weight_norm_tiles<T, E, true, kEither> : weight_norm_tiles<T, E, true, false>)
          : (transposed ? weight_norm_tiles<T, E, false, kEither> : weight_norm_tiles<T, E, false, false>);
  const auto finish = by_rows ? weight_norm_finish<T, true> : weight_norm_finish<T, false>;
  const cudaError_t error =
      launch(tiles, dim3(strips, op.splits), kTileThreads, kTileMemory<T, E>, false, stream, op);
  if (error != cudaSuccess) return error;
  constexpr size_t kShared = kFinishThreads / 32 * sizeof(double) + kFinishLines * sizeof(int);
  return launch(finish, dim3(divide_up(op.lines, kFinishLines)), kFinishThreads, kShared, false, stream, op);
}

}  // namespace lora_fast::cuda
