// Norms of the rows of V, from its tiles: what they are made of is a matter of the tiles alone.
#pragma once

#include <cmath>
#include <optional>

#include "norm_of_line.h"

namespace lora_fast {

template <class F>
LORA_FAST_INLINE void add_squares(Strip<F>& sums, const Strip<F>& x) {
  sums.even += x.even * x.even;
  sums.odd += x.odd * x.odd;
}

// squares[i] of rows [0, v.rows) whose tiles come as for_each_update's: all columns of a block of rows before
// the next block
template <class F>
class RowSquares {
 public:
  RowSquares(const RankUpdate& v, double* squares) : cols_(v.cols), squares_(squares) {}

  template <class Tile>
  LORA_FAST_INLINE void add(const Tile& tile) {
    F* own = sums_ + tile.i % kTileRows * kLanes;  // of the tile's rows
    if (tile.j == 0) std::fill(own, own + tile.rows * kLanes, F{});
    for (int64_t r = 0; r < tile.rows; ++r) {
      tile.fetch(r);
      Strip<F> part{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < tile.cols; k += kStrip) add_squares(part, tile.strip(r, k));
      F* sum = own + r * kLanes;
      store<F>(sum, load<F>(sum) + (part.even + part.odd));
    }
    if (tile.j + tile.cols < cols_) return;
    for (int64_t r = 0; r < tile.rows; ++r) squares_[tile.i + r] = sum_lanes<F>(load<F>(own + r * kLanes));
  }

 private:
  alignas(64) F sums_[kTileRows * kLanes];
  int64_t cols_;
  double* squares_;
};

// norms[i] = √squares[i] or, where that cannot be trusted, norm_of(i, buffer) with norm_of_line's buffer
template <class F, class NormOf>
void write_norms(const RankUpdate& v, int64_t length, const double* squares, F* norms, int64_t begin,
                 int64_t end, const NormOf& norm_of) {
  std::optional<Scratch<double>> buffer;
  for (int64_t i = begin; i < end; ++i) {
    if (needs_redo(squares[i], v.wide)) {
      if (!buffer) buffer.emplace(2 * length + v.rank);
      norms[i] = static_cast<F>(norm_of(i, buffer->data()));
    } else {
      norms[i] = static_cast<F>(std::sqrt(squares[i]));
    }
  }
}

// The norms of V's rows; square_rows(squares, begin, end) is for the blocks of kTileRows rows in [begin,
// end).
template <class F, class SquareRows, class NormOf>
void norm_rows(const RankUpdate& v, const PackedAdapter& adapter, F* norms, const SquareRows& square_rows,
               const NormOf& norm_of) {
  Scratch<double> squares(v.rows);
  for_chunks(row_chunks(v, 65536), row_blocks(v), [&](int64_t, int64_t begin, int64_t end) {
    {
      const AmxScope scope(adapter.layout.pairs, adapter.layout.step);
      square_rows(squares.data(), begin, end);
    }
    const int64_t rows_end = std::min(v.rows, end * kTileRows);
    write_norms(v, v.cols, squares.data(), norms, begin * kTileRows, rows_end, norm_of);
  });
}

}  // namespace lora_fast
