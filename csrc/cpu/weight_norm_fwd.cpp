// n = ‖W + s B A‖ by rows or by columns: one read of W, squares summed as each tile is made.
#include "ops.h"
#include "row_norms.h"

namespace lora_fast {
namespace {

// squares[i] for the blocks of kTileRows rows in [begin, end)
template <class F, class T>
LORA_FAST_INLINE void square_rows_of(const AdaptedWeight& v, const PackedAdapter& adapter, double* squares,
                                     int64_t begin, int64_t end) {
  RowSquares<F> rows(v, squares);
  const TileRange range{begin, end, 0, col_blocks(v), few_tile_rows(adapter.layout)};
  for_each_tile<F, T>(v, adapter, range,
                      [&](const AdaptedTile<F, T>& tile) LORA_FAST_ALWAYS_INLINE { rows.add(tile); });
}

// sums[j] += the squares of the same rows; sums [cols rounded up to kTileCols], in the order of strips
template <class F, class T>
LORA_FAST_INLINE void square_columns_of(const AdaptedWeight& v, const PackedAdapter& adapter, F* sums,
                                        int64_t begin, int64_t end) {
  constexpr int64_t kStrips = kTileCols / kStrip;
  const TileRange range{begin, end, 0, col_blocks(v), few_tile_rows(adapter.layout)};
  for_each_tile<F, T>(v, adapter, range, [&](const AdaptedTile<F, T>& tile) LORA_FAST_ALWAYS_INLINE {
    Strip<F> total[kStrips] = {};
    for (int64_t r = 0; r < tile.rows; ++r) {
      tile.fetch(r);
#pragma GCC unroll 4
      for (int64_t k = 0; k < kStrips; ++k) {
        if (k * kStrip >= tile.cols) break;
        add_squares(total[k], tile.strip(r, k * kStrip));
      }
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < kStrips; ++k) {
      F* sum = sums + tile.j + k * kStrip;
      const Strip<F> old = load_packed(sum);
      store_packed<F>(sum, {old.even + total[k].even, old.odd + total[k].odd});
    }
  });
}

template <class F>
LORA_FAST_CLONES void square_rows(const AdaptedWeight& v, const PackedAdapter& adapter, double* squares,
                                  int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T, square_rows_of<F, T>(v, adapter, squares, begin, end))
}

template <class F>
LORA_FAST_CLONES void square_columns(const AdaptedWeight& v, const PackedAdapter& adapter, F* sums,
                                     int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T, square_columns_of<F, T>(v, adapter, sums, begin, end))
}

template <class F>
void norm_columns(const AdaptedWeight& v, const PackedAdapter& adapter, F* norms) {
  const int64_t width = round_up(v.cols, kTileCols);
  const int64_t chunks = row_chunks(v, 65536);
  Scratch<F> sums(chunks * width);  // one row per chunk
  for_chunks(chunks, row_blocks(v), [&](int64_t chunk, int64_t begin, int64_t end) {
    F* own = sums.data() + chunk * width;
    std::fill(own, own + width, F{});
    const AmxScope scope(adapter.layout.pairs, adapter.layout.step);
    square_columns(v, adapter, own, begin, end);
  });
  Scratch<double> squares(v.cols);
  for (int64_t j = 0; j < v.cols; ++j) {
    const int64_t at = adapter.layout.dealt ? dealt_position(j) : j;
    squares.data()[j] = 0;
    for (int64_t c = 0; c < chunks; ++c)
      squares.data()[j] += static_cast<double>(sums.data()[c * width + at]);
  }
  for_chunks(chunk_count(v.cols, 256), v.cols, [&](int64_t, int64_t begin, int64_t end) {
    write_norms(v, v.rows, squares.data(), norms, begin, end,
                [&](int64_t j, double* buffer) { return norm_of_line(v, false, j, buffer); });
  });
}

template <class F>
void norm(const AdaptedWeight& v, bool by_rows, F* norms) {
  const PackedAdapter adapter(v);
  if (!by_rows) return norm_columns(v, adapter, norms);
  norm_rows(
      v, adapter, norms,
      [&](double* squares, int64_t begin, int64_t end) { square_rows<F>(v, adapter, squares, begin, end); },
      [&](int64_t i, double* buffer) { return norm_of_line(v, true, i, buffer); });
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
