// n = ‖W + s B A‖ by rows or by columns: one read of W, squares summed as each tile is made.
#include <cmath>

#include "norm_of_line.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// The next tile's part of this row, into the second-level cache (rows of a power of two apart share few sets
// of the first): more rows are read side by side than the processor's own prefetcher follows.
template <class T>
LORA_FAST_INLINE void prefetch_next(const T* w) {
  constexpr int64_t kLine = 64 / sizeof(T);
#pragma GCC unroll 16
  for (int64_t k = 0; k < kTileCols; k += kLine) __builtin_prefetch(w + kTileCols + k, 0, 2);
}

template <class F, class T>
LORA_FAST_INLINE Strip<F> strip_of(const T* w, const F* c, Vec<F> s, int64_t cols) {
  const Strip<F> x = load_strip_n<F>(w, cols), update = load_packed(c);
  return {x.even + s * update.even, x.odd + s * update.odd};
}

// squares[i] for the blocks of kTileRows rows in [begin, end)
template <class F, class T>
LORA_FAST_INLINE void square_rows(const AdaptedWeight& v, const PackedAdapter& adapter, double* squares,
                                  int64_t begin, int64_t end) {
  alignas(64) F c[kTileRows * kTileCols];
  alignas(64) T gathered[kTileRows * kTileCols];
  const Vec<F> s = splat(static_cast<F>(v.scaling));
  for (int64_t i = begin * kTileRows; i < std::min(v.rows, end * kTileRows); i += kTileRows) {
    const int64_t rows = std::min(kTileRows, v.rows - i);
    alignas(64) F sums[kTileRows * kLanes] = {};
    for (int64_t j = 0; j < v.cols; j += kTileCols) {
      const int64_t cols = std::min(kTileCols, v.cols - j);
      rank_tile(adapter.layout, adapter.p.at(i), adapter.q.at(j), c, rows, cols);
      const WeightTile<T> w = weight_tile(v, i, j, rows, cols, gathered);
      for (int64_t r = 0; r < rows; ++r) {
        const T* w_row = w.data + r * w.stride;
        const F* c_row = c + r * kTileCols;
        prefetch_next(w_row);
        Vec<F> even{}, odd{};
        if (cols == kTileCols) {
#pragma GCC unroll 4
          for (int64_t k = 0; k < kTileCols; k += kStrip) {
            const Strip<F> x = strip_of(w_row + k, c_row + k, s, kStrip);
            even += x.even * x.even;
            odd += x.odd * x.odd;
          }
        } else {
          for (int64_t k = 0; k < cols; k += kStrip) {
            const Strip<F> x = strip_of(w_row + k, c_row + k, s, cols - k);
            even += x.even * x.even;
            odd += x.odd * x.odd;
          }
        }
        F* sum = sums + r * kLanes;
        store<F>(sum, load<F>(sum) + (even + odd));
      }
    }
    for (int64_t r = 0; r < rows; ++r) squares[i + r] = sum_lanes<F>(load<F>(sums + r * kLanes));
  }
}

// sums[j] += the squares of the same rows; sums [cols rounded up to kTileCols], in the order of strips
template <class F, class T>
LORA_FAST_INLINE void square_columns(const AdaptedWeight& v, const PackedAdapter& adapter, F* sums,
                                     int64_t begin, int64_t end) {
  alignas(64) F c[kTileRows * kTileCols];
  alignas(64) T gathered[kTileRows * kTileCols];
  const Vec<F> s = splat(static_cast<F>(v.scaling));
  constexpr int64_t kStrips = kTileCols / kStrip;
  for (int64_t i = begin * kTileRows; i < std::min(v.rows, end * kTileRows); i += kTileRows) {
    const int64_t rows = std::min(kTileRows, v.rows - i);
    for (int64_t j = 0; j < v.cols; j += kTileCols) {
      const int64_t cols = std::min(kTileCols, v.cols - j);
      rank_tile(adapter.layout, adapter.p.at(i), adapter.q.at(j), c, rows, cols);
      const WeightTile<T> w = weight_tile(v, i, j, rows, cols, gathered);
      Strip<F> total[kStrips] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const T* w_row = w.data + r * w.stride;
        const F* c_row = c + r * kTileCols;
        prefetch_next(w_row);
#pragma GCC unroll 4
        for (int64_t k = 0; k < kStrips; ++k) {
          const int64_t left = cols - k * kStrip;
          if (left <= 0) break;
          const Strip<F> x = strip_of(w_row + k * kStrip, c_row + k * kStrip, s, left);
          total[k].even += x.even * x.even;
          total[k].odd += x.odd * x.odd;
        }
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < kStrips; ++k) {
        F* sum = sums + j + k * kStrip;
        const Strip<F> old = load_packed(sum);
        store_packed<F>(sum, {old.even + total[k].even, old.odd + total[k].odd});
      }
    }
  }
}

LORA_FAST_CLONES void square_rows_float(const AdaptedWeight& v, const PackedAdapter& adapter, double* squares,
                                        int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T, square_rows<float, T>(v, adapter, squares, begin, end))
}

void square_rows_double(const AdaptedWeight& v, const PackedAdapter& adapter, double* squares, int64_t begin,
                        int64_t end){
    LORA_FAST_BY_DTYPE(v.dtype, T, square_rows<double, T>(v, adapter, squares, begin, end))}

LORA_FAST_CLONES void square_columns_float(const AdaptedWeight& v, const PackedAdapter& adapter, void* sums,
                                           int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T, square_columns<float, T>(v, adapter, static_cast<float*>(sums), begin, end))
}

void square_columns_double(const AdaptedWeight& v, const PackedAdapter& adapter, void* sums, int64_t begin,
                           int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T,
                     square_columns<double, T>(v, adapter, static_cast<double*>(sums), begin, end))
}

template <class F>
void write_norms(const AdaptedWeight& v, bool row, const double* squares, F* norms, int64_t begin,
                 int64_t end) {
  const int64_t length = row ? v.cols : v.rows;
  std::optional<Scratch<double>> buffer;
  for (int64_t i = begin; i < end; ++i) {
    if (needs_redo(squares[i], v.wide)) {
      if (!buffer) buffer.emplace(2 * length + v.rank);
      norms[i] = static_cast<F>(norm_of_line(v, row, i, buffer->data()));
    } else {
      norms[i] = static_cast<F>(std::sqrt(squares[i]));
    }
  }
}

template <class F>
void norm_rows(const AdaptedWeight& v, const PackedAdapter& adapter, F* norms) {
  Scratch<double> squares(v.rows);
  const int64_t blocks = round_up(v.rows, kTileRows) / kTileRows;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kTileRows * v.cols));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    {
      const AmxScope scope(adapter.layout.amx, adapter.layout.step);
      (v.wide ? square_rows_double : square_rows_float)(v, adapter, squares.data(), begin, end);
    }
    write_norms(v, true, squares.data(), norms, begin * kTileRows, std::min(v.rows, end * kTileRows));
  });
}

template <class F>
void norm_columns(const AdaptedWeight& v, const PackedAdapter& adapter, F* norms) {
  const int64_t width = round_up(v.cols, kTileCols);
  const int64_t blocks = round_up(v.rows, kTileRows) / kTileRows;
  const int64_t chunks = chunk_count(blocks, std::max<int64_t>(1, 65536 / (kTileRows * v.cols)));
  Scratch<F> sums(chunks * width);  // one row per chunk
  for_chunks(chunks, blocks, [&](int64_t chunk, int64_t begin, int64_t end) {
    F* own = sums.data() + chunk * width;
    std::fill(own, own + width, F{});
    const AmxScope scope(adapter.layout.amx, adapter.layout.step);
    (v.wide ? square_columns_double : square_columns_float)(v, adapter, own, begin, end);
  });
  Scratch<double> squares(v.cols);
  for (int64_t j = 0; j < v.cols; ++j) {
    const int64_t at = adapter.layout.dealt ? dealt_position(j) : j;
    squares.data()[j] = 0;
    for (int64_t c = 0; c < chunks; ++c)
      squares.data()[j] += static_cast<double>(sums.data()[c * width + at]);
  }
  for_chunks(chunk_count(v.cols, 256), v.cols, [&](int64_t, int64_t begin, int64_t end) {
    write_norms(v, false, squares.data(), norms, begin, end);
  });
}

template <class F>
void norm(const AdaptedWeight& v, bool by_rows, F* norms) {
  const PackedAdapter adapter(v);
  by_rows ? norm_rows(v, adapter, norms) : norm_columns(v, adapter, norms);
}

}  // namespace

Tensor cpu::weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output) {
  check_adapter(weight, lora_A, lora_B);
  const AdaptedWeight v(weight, lora_A, lora_B, scaling);
  const int64_t size[] = {weight.size(per_output ? 0 : 1)};
  Tensor norms = torch::stable::new_empty(weight, {size, 1}, v.wide ? ScalarType::Double : ScalarType::Float);
  const bool by_rows = per_output != v.transposed;
  if (v.wide) {
    norm(v, by_rows, static_cast<double*>(norms.mutable_data_ptr()));
  } else {
    norm(v, by_rows, static_cast<float*>(norms.mutable_data_ptr()));
  }
  return norms;
}

}  // namespace lora_fast
