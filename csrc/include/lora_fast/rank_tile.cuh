// Tiles of V = base + s P Qᵀ, base [rows, cols], P [rows, R], Q [cols, R]: the norm's W + s B A and
// composition's base + s h Bᵀ. A tile of P Qᵀ is made in registers while base's tile is on its way to shared
// memory.
//
// 16-bit factors are multiplied on the tensor cores: their products are exact in float32 and summed there.
// Other factors are multiplied in float32: never TF32.
#pragma once

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

constexpr int kTileThreads = 256;  // 4 × 2 warps of 32 rows × half of the columns
constexpr int kTileRows = 128;
constexpr int kTileRowBytes = 256;

template <class T>
constexpr int kTileCols = kTileRowBytes / sizeof(T);

// Elements of one row of base's tile in shared memory; the padding spreads a fragment's rows over the banks.
template <class T>
constexpr int kBaseStride = kTileCols<T> + 8;

// A matrix in memory. `vector`: columns are adjacent and each row starts at a multiple of 16 bytes.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
  bool vector;
};

// P or Q. `vector`: adjacent and aligned along the rank, or, by the kernel's template, across it.
struct Factor {
  const void* data;
  Dtype dtype;
  int64_t stride_outer, stride_rank;
  bool vector;
};

// A matrix as the caller has it.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;

  Operand transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// Whether rows, not columns, are adjacent.
inline bool is_transposed(const Operand& x) {
  return x.col_stride != 1 && x.row_stride == 1;
}

template <class T>
Matrix<T> matrix_of(const Operand& x) {
  using Plain = std::remove_const_t<T>;
  const bool vector = x.col_stride == 1 && lines_are_aligned<Plain>(x.data, x.row_stride);
  return {static_cast<T*>(const_cast<void*>(x.data)), x.row_stride, x.col_stride, vector};
}

// x [outer, R], as kernels with factors of type E read it.
template <class E>
Factor factor_of(const Operand& x, bool across) {
  const int64_t adjacent = across ? x.row_stride : x.col_stride, line = across ? x.col_stride : x.row_stride;
  return {x.data, x.dtype, x.row_stride, x.col_stride, adjacent == 1 && lines_are_aligned<E>(x.data, line)};
}

struct RankProduct {
  int64_t rows, cols, rank;
  Factor p, q;
  float scaling;
};

// The tiles of one block: `count` of them from (row, col), one tile's height or width apart.
struct TileWalk {
  int64_t row, col;
  int count;
  bool down;
};

// How factors of type E lie in shared memory. 16-bit: as in memory, [outer][rank] or [rank][outer], for
// load_matrices. float: [rank][outer], whatever memory has. A step is as deep as one multiply_add; deeper
// ones, and float's of more than 8 beside 16-bit tiles of base, leave the 99 KB of the smallest devices.
template <class E>
struct FactorTile {
  static constexpr bool kTensorCores = sizeof(E) == 2;
  static constexpr int kDepth = kTensorCores ? 16 : 8;
  static constexpr int kRankStride = kDepth + 8;  // [outer][rank]
  template <int outer>
  static constexpr int kOuterStride = outer + (kTensorCores ? 8 : 4);  // [rank][outer]
  template <int outer>
  static constexpr int kSize =
      outer * kRankStride > kDepth* kOuterStride<outer>&& kTensorCores ? outer * kRankStride
                                                                       : kDepth * kOuterStride<outer>;
};

constexpr int kStages = 2;

template <class T, class E>
constexpr size_t kTileMemory =
    kStages *
    (kTileRows * kBaseStride<T> * sizeof(T) +
     (FactorTile<E>::template kSize<kTileRows> + FactorTile<E>::template kSize<kTileCols<T>>)*sizeof(E));

// A lane's part of a tile: rows row(i, half), columns col(j) and col(j) + 1.
template <class T>
struct Fragment {
  static constexpr int kRowBlocks = 2, kColBlocks = kTileCols<T> / 16;
  float at[kRowBlocks][kColBlocks][4];

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp_row() { return threadIdx.x / 64 * 32; }
  __device__ static int warp_col() { return threadIdx.x / 32 % 2 * (kTileCols<T> / 2); }
  __device__ static int row(int i, int half) { return warp_row() + 16 * i + 8 * half + lane() / 4; }
  __device__ static int col(int j) { return warp_col() + 8 * j + lane() % 4 * 2; }
  // of at[i][j][2 * half + e] in base's tile
  __device__ static int place(int i, int half, int j, int e) {
    return row(i, half) * kBaseStride<T> + col(j) + e;
  }

  // f(i, half, j, e) for each element, which the compiler knows apart.
  template <class Function>
  __device__ static void for_each(Function&& f) {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kColBlocks; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) f(i, half, j, e);
  }

  __device__ void clear() {
    for (auto& rows : at)
      for (auto& block : rows)
        for (float& x : block) x = 0;
  }
};

// base's tile at (row, col) of the matrix [rows, cols]; zero outside.
template <class T>
__device__ void load_base(T* tile, const Matrix<const T>& base, int64_t rows, int64_t cols, int64_t row,
                          int64_t col) {
  constexpr int kVector = Vector<T>::kSize, kVectors = kTileCols<T> / kVector;
  if (base.vector) {
    const int64_t rows_left = rows - row, cols_left = cols - col;
    const T* corner = base.data + row * base.row_stride + col;
#pragma unroll 1  // more of them would cost the registers that the sums need
    for (int at = threadIdx.x; at < kTileRows * kVectors; at += kTileThreads) {
      const int i = at / kVectors, j = at % kVectors * kVector;
      const int64_t left = i < rows_left ? cols_left - j : 0;
      const int bytes = static_cast<int>(left <= 0 ? 0 : left < kVector ? left : kVector) * sizeof(T);
      copy_async_16(tile + i * kBaseStride<T> + j, bytes > 0 ? corner + i * base.row_stride + j : base.data,
                    bytes);
    }
    return;
  }
  for (int at = threadIdx.x; at < kTileRows * kTileCols<T>; at += kTileThreads) {
    const int i = at / kTileCols<T>, j = at % kTileCols<T>;
    const bool inside = row + i < rows && col + j < cols;
    tile[i * kBaseStride<T> + j] =
        inside ? base.data[(row + i) * base.row_stride + (col + j) * base.col_stride] : rounded<T>(0.0f);
  }
}

// Writes base's tile in shared memory, which the whole block has filled, to (row, col) of the matrix.
template <class T>
__device__ void store_tile(const T* tile, const Matrix<T>& out, int64_t rows, int64_t cols, int64_t row,
                           int64_t col) {
  constexpr int kVector = Vector<T>::kSize, kVectors = kTileCols<T> / kVector;
  if (out.vector && cols - col >= kTileCols<T>) {
    for (int at = threadIdx.x; at < kTileRows * kVectors; at += kTileThreads) {
      const int i = at / kVectors, j = at % kVectors * kVector;
      if (row + i < rows)
        store_vector(out.data + (row + i) * out.row_stride + col + j,
                     load_vector(tile + i * kBaseStride<T> + j));
    }
    return;
  }
  for (int at = threadIdx.x; at < kTileRows * kTileCols<T>; at += kTileThreads) {
    const int i = at / kTileCols<T>, j = at % kTileCols<T>;
    if (row + i < rows && col + j < cols)
      out.data[(row + i) * out.row_stride + (col + j) * out.col_stride] = tile[i * kBaseStride<T> + j];
  }
}

// Rows [start, start + outer) of a factor [size, R], ranks [first, first + kDepth); zero outside. across:
// [rank][outer].
template <class E, int outer, bool across>
__device__ void load_factor(E* tile, const Factor& factor, int64_t size, int64_t rank, int64_t start,
                            int64_t first) {
  using Tile = FactorTile<E>;
  constexpr int kDepth = Tile::kDepth;
  if constexpr (Tile::kTensorCores) {
    if (factor.vector) {
      constexpr int kVector = Vector<E>::kSize, kVectors = (across ? outer : kDepth) / kVector;
      constexpr int kLines = across ? kDepth : outer;
      const int64_t rows_left = size - start, ranks_left = rank - first;
      const int64_t stride = across ? factor.stride_rank : factor.stride_outer;
      const E* data = static_cast<const E*>(factor.data);
      const E* corner = data + (across ? first * stride + start : start * stride + first);
      for (int at = threadIdx.x; at < kLines * kVectors; at += kTileThreads) {
        const int line = at / kVectors, j = at % kVectors * kVector;
        const int64_t left =
            line < (across ? ranks_left : rows_left) ? (across ? rows_left : ranks_left) - j : 0;
        const int bytes = static_cast<int>(left <= 0 ? 0 : left < kVector ? left : kVector) * sizeof(E);
        copy_async_16(tile + line * (across ? Tile::template kOuterStride<outer> : Tile::kRankStride) + j,
                      bytes > 0 ? corner + line * stride + j : data, bytes);
      }
      return;
    }
  }
  const bool along = factor.stride_rank <= factor.stride_outer;
#pragma unroll 4
  for (int at = threadIdx.x; at < kDepth * outer; at += kTileThreads) {
    const int i = along ? at / kDepth : at % outer, r = along ? at % kDepth : at / outer;
    const int64_t index = (start + i) * factor.stride_outer + (first + r) * factor.stride_rank;
    const bool inside = start + i < size && first + r < rank;
    const int to = across || !Tile::kTensorCores ? r * Tile::template kOuterStride<outer> + i
                                                 : i * Tile::kRankStride + r;
    if constexpr (Tile::kTensorCores) {
      tile[to] = inside ? static_cast<const E*>(factor.data)[index] : rounded<E>(0.0f);
    } else {
      tile[to] = inside ? element(factor.data, factor.dtype, index) : 0.0f;
    }
  }
}

// c += P Qᵀ over the ranks in shared memory
template <class T, class E, bool p_across, bool q_across>
__device__ void multiply_factors(Fragment<T>& c, const E* p, const E* q) {
  using Tile = FactorTile<E>;
  using Part = Fragment<T>;
  const int lane = Part::lane();
  if constexpr (Tile::kTensorCores) {
    constexpr int kP = p_across ? Tile::template kOuterStride<kTileRows> : Tile::kRankStride;
    constexpr int kQ = q_across ? Tile::template kOuterStride<kTileCols<T>> : Tile::kRankStride;
    const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    uint32_t a[Part::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < Part::kRowBlocks; ++i) {
      const int outer = Part::warp_row() + 16 * i + middle;
      load_matrices<p_across>(a[i], p_across ? p + (low + high) * kP + outer : p + (outer + low) * kP + high);
    }
#pragma unroll
    for (int j = 0; j < Part::kColBlocks; j += 2) {
      const int outer = Part::warp_col() + 8 * j + high;
      uint32_t b[4];
      load_matrices<q_across>(b,
                              q_across ? q + (low + middle) * kQ + outer : q + (outer + low) * kQ + middle);
#pragma unroll
      for (int i = 0; i < Part::kRowBlocks; ++i) {
        multiply_add<E>(c.at[i][j], a[i], b[0], b[1]);
        multiply_add<E>(c.at[i][j + 1], a[i], b[2], b[3]);
      }
    }
  } else {
    // a step's products are summed apart, some columns at a time for want of registers: one long chain of
    // additions along the rank would round several times as much
    constexpr int kP = Tile::template kOuterStride<kTileRows>, kQ = Tile::template kOuterStride<kTileCols<T>>;
    constexpr int kColumns = Part::kColBlocks / 4;
#pragma unroll
    for (int first = 0; first < Part::kColBlocks; first += kColumns) {
      float sums[Part::kRowBlocks][kColumns][4] = {};
#pragma unroll 1
      for (int r = 0; r < Tile::kDepth; ++r) {
        float a[Part::kRowBlocks][2];
        for (int i = 0; i < Part::kRowBlocks; ++i)
          for (int half = 0; half < 2; ++half) a[i][half] = p[r * kP + Part::row(i, half)];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float2 b = *reinterpret_cast<const float2*>(q + r * kQ + Part::col(first + j));
          for (int i = 0; i < Part::kRowBlocks; ++i) {
            for (int half = 0; half < 2; ++half) {
              sums[i][j][2 * half] += a[i][half] * b.x;
              sums[i][j][2 * half + 1] += a[i][half] * b.y;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Part::kRowBlocks; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) c.at[i][first + j][e] += sums[i][j][e];
    }
  }
}

// Calls finish(fragment of P Qᵀ, base's tile in shared memory, row, col) for each tile of the walk, by the
// whole block. The next step's copies are under way meanwhile; finish may synchronise.
template <class T, class E, bool p_across, bool q_across, class Finish>
__device__ void for_each_tile(const Matrix<const T>& base, const RankProduct& product, const TileWalk& walk,
                              Finish&& finish) {
  using Tile = FactorTile<E>;
  constexpr int kBase = kTileRows * kBaseStride<T>;
  constexpr int kP = Tile::template kSize<kTileRows>, kQ = Tile::template kSize<kTileCols<T>>;
  T* bases = reinterpret_cast<T*>(shared_memory());
  E* factors = reinterpret_cast<E*>(bases + kStages * kBase);
  const int chunks = product.rank > 0 ? static_cast<int>(divide_up(product.rank, Tile::kDepth)) : 1;

  const auto row_of = [&](int tile) { return walk.row + (walk.down ? tile * kTileRows : 0); };
  const auto col_of = [&](int tile) { return walk.col + (walk.down ? 0 : tile * kTileCols<T>); };
  const auto fetch = [&](int tile, int chunk, int stage) {
    E* p = factors + stage * (kP + kQ);
    const int64_t row = row_of(tile), col = col_of(tile), rank = chunk * Tile::kDepth;
    if (chunk == 0) load_base(bases + tile % kStages * kBase, base, product.rows, product.cols, row, col);
    load_factor<E, kTileRows, p_across>(p, product.p, product.rows, product.rank, row, rank);
    load_factor<E, kTileCols<T>, q_across>(p + kP, product.q, product.cols, product.rank, col, rank);
  };

  Fragment<T> c;
  int tile = 0, chunk = 0, next_tile = 0, next_chunk = 0, stage = 0;
  const auto fetch_next = [&](int stage) {
    if (next_tile < walk.count) fetch(next_tile, next_chunk, stage);
    commit_copies();
    if (++next_chunk == chunks) {
      next_chunk = 0;
      ++next_tile;
    }
  };
  fetch_next(0);
  for (; tile < walk.count; stage = 1 - stage) {
    fetch_next(1 - stage);
    wait_for_copies<1>();
    __syncthreads();
    if (chunk == 0) c.clear();
    const E* p = factors + stage * (kP + kQ);
    multiply_factors<T, E, p_across, q_across>(c, p, p + kP);
    if (++chunk == chunks) {
      finish(c, bases + tile % kStages * kBase, row_of(tile), col_of(tile));
      chunk = 0;
      ++tile;
    }
    __syncthreads();
  }
  wait_for_copies<0>();
}

// Into how many walks to split the tiles of a strip, so that the blocks of all strips fill the device's slots
// in the fewest rounds; a walk costs one tile's time to begin.
inline int64_t plan_splits(int64_t strips, int64_t tiles, int64_t slots, int64_t most) {
  int64_t best = 1, least = -1;
  for (int64_t splits = 1; splits <= tiles && splits <= most; ++splits) {
    const int64_t cost = divide_up(strips * splits, slots) * (divide_up(tiles, splits) + 1);
    if (least < 0 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

}  // namespace lora_fast::cuda
