// n = ‖W + s B A‖ by rows or by columns: one read of W, squares summed as each tile is made. Of many
// adapters, a block of W's rows meets each while it is in the second-level cache.
#include <memory>

#include "grouped.h"
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

// The same for the blocks of some adapters of one W, each block for all of them.
struct Adapter {
  explicit Adapter(const AdaptedWeight& weight) : v(weight), packed(weight) {}
  AdaptedWeight v;
  PackedAdapter packed;
};
using Adapters = std::vector<std::unique_ptr<Adapter>>;

template <class Function>
void for_each_block(const Adapters& adapters, int64_t begin, int64_t end, const Function& f) {
  for (int64_t block = begin; block < end; ++block) {
    for (size_t a = 0; a < adapters.size(); ++a) {
      const RankLayout& layout = adapters[a]->packed.layout;
      const AmxScope scope(layout.pairs, layout.step);
      f(*adapters[a], static_cast<int64_t>(a), block);
    }
  }
}

// norms [adapters][cols]
template <class F>
void norms_of_columns(const Adapters& adapters, F* norms) {
  const AdaptedWeight& first = adapters[0]->v;
  const int64_t count = static_cast<int64_t>(adapters.size()), width = round_up(first.cols, kTileCols);
  const int64_t chunks = row_chunks(first, 65536);
  Scratch<F> sums(chunks * count * width);  // a row per chunk and adapter
  for_chunks(chunks, row_blocks(first), [&](int64_t chunk, int64_t begin, int64_t end) {
    F* own = sums.data() + chunk * count * width;
    std::fill(own, own + count * width, F{});
    for_each_block(adapters, begin, end, [&](const Adapter& adapter, int64_t a, int64_t block) {
      square_columns(adapter.v, adapter.packed, own + a * width, block, block + 1);
    });
  });
  Scratch<double> squares(first.cols);
  for (int64_t a = 0; a < count; ++a) {
    const AdaptedWeight& v = adapters[static_cast<size_t>(a)]->v;
    const bool dealt = adapters[static_cast<size_t>(a)]->packed.layout.dealt;
    for (int64_t j = 0; j < v.cols; ++j) {
      const int64_t at = dealt ? dealt_position(j) : j;
      squares.data()[j] = 0;
      for (int64_t c = 0; c < chunks; ++c)
        squares.data()[j] += static_cast<double>(sums.data()[(c * count + a) * width + at]);
    }
    for_chunks(chunk_count(v.cols, 256), v.cols, [&](int64_t, int64_t begin, int64_t end) {
      write_norms(v, v.rows, squares.data(), norms + a * v.cols, begin, end,
                  [&](int64_t j, double* buffer) { return norm_of_line(v, false, j, buffer); });
    });
  }
}

// norms [adapters][rows]
template <class F>
void norms_of_rows(const Adapters& adapters, F* norms) {
  const AdaptedWeight& first = adapters[0]->v;
  const int64_t count = static_cast<int64_t>(adapters.size()), rows = first.rows;
  Scratch<double> squares(count * rows);
  for_chunks(row_chunks(first, 65536), row_blocks(first), [&](int64_t, int64_t begin, int64_t end) {
    for_each_block(adapters, begin, end, [&](const Adapter& adapter, int64_t a, int64_t block) {
      square_rows<F>(adapter.v, adapter.packed, squares.data() + a * rows, block, block + 1);
    });
    for (int64_t a = 0; a < count; ++a) {
      const AdaptedWeight& v = adapters[static_cast<size_t>(a)]->v;
      write_norms(v, v.cols, squares.data() + a * rows, norms + a * rows, begin * kTileRows,
                  std::min(rows, end * kTileRows),
                  [&](int64_t i, double* buffer) { return norm_of_line(v, true, i, buffer); });
    }
  });
}

template <class F>
void norm(const Adapters& adapters, bool by_rows, F* norms) {
  by_rows ? norms_of_rows(adapters, norms) : norms_of_columns(adapters, norms);
}

}  // namespace

Tensor cpu::weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output) {
  check_adapter(weight, lora_A, lora_B);
  Adapters adapters;
  adapters.push_back(std::make_unique<Adapter>(AdaptedWeight(weight, lora_A, lora_B, scaling)));
  const AdaptedWeight& v = adapters[0]->v;
  const int64_t size[] = {weight.size(per_output ? 0 : 1)};
  Tensor norms = torch::stable::new_empty(weight, {size, 1}, v.wide ? ScalarType::Double : ScalarType::Float);
  const bool by_rows = per_output != v.transposed;
  if (v.wide) {
    norm(adapters, by_rows, static_cast<double*>(norms.mutable_data_ptr()));
  } else {
    norm(adapters, by_rows, static_cast<float*>(norms.mutable_data_ptr()));
  }
  return norms;
}

Tensor cpu::grouped_weight_norm_fwd(Tensor weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                                    std::vector<double> scaling) {
  const size_t count = scaling.size();
  STD_TORCH_CHECK(count > 0 && lora_A.size() == count && lora_B.size() == count,
                  "lora_A, lora_B and scaling must be of as many adapters");
  for (size_t a = 0; a < count; ++a) check_adapter(weight, lora_A[a], lora_B[a]);
  bool wide = is_double(weight);
  for (size_t a = 0; a < count; ++a) wide = wide || is_double(lora_A[a]) || is_double(lora_B[a]);
  const int64_t N = weight.size(0), K = weight.size(1), size[] = {static_cast<int64_t>(count), N};
  Tensor norms = torch::stable::new_empty(weight, {size, 2}, wide ? ScalarType::Double : ScalarType::Float);
  // as many adapters at a time as take an eighth of W to pack: W is read once for these
  for (size_t next = 0; next < count;) {
    Adapters adapters;
    const int64_t begin = static_cast<int64_t>(next);
    for (int64_t packed = 0; next < count; ++next) {
      packed += lora_A[next].size(0) * (N + K);
      if (!adapters.empty() && packed > N * K / 8) break;
      AdaptedWeight v(weight, lora_A[next], lora_B[next], scaling[next]);
      v.wide = wide;
      adapters.push_back(std::make_unique<Adapter>(v));
    }
    const bool by_rows = !adapters[0]->v.transposed;
    if (wide) {
      norm(adapters, by_rows, static_cast<double*>(norms.mutable_data_ptr()) + begin * N);
    } else {
      norm(adapters, by_rows, static_cast<float*>(norms.mutable_data_ptr()) + begin * N);
    }
  }
  return norms;
}

}  // namespace lora_fast
