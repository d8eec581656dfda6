// W ← (W + s B A) ⊙ gain, in place, tile by tile, each element rounded once.
#include "adapted_weight.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// Row blocks [begin, end). row_gain and col_gain: at most one is given; col_gain is packed.
template <class F, class T>
LORA_FAST_INLINE void merge(const AdaptedWeight& v, const PackedAdapter& adapter, const F* row_gain,
                            const F* col_gain, int64_t begin, int64_t end) {
  alignas(64) F c[kTileRows * kTileCols];
  alignas(64) T gathered[kTileRows * kTileCols];
  const Vec<F> s = splat(static_cast<F>(v.scaling));
  for (int64_t i = begin * kTileRows; i < std::min(v.rows, end * kTileRows); i += kTileRows) {
    const int64_t rows = std::min(kTileRows, v.rows - i);
    for (int64_t j = 0; j < v.cols; j += kTileCols) {
      const int64_t cols = std::min(kTileCols, v.cols - j);
      rank_tile(adapter.layout, adapter.p.at(i), adapter.q.at(j), c, rows, cols);
      const WeightTile<T> w = weight_tile(v, i, j, rows, cols, gathered);
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<F> row = splat(row_gain != nullptr ? row_gain[i + r] : F{1});
        for (int64_t k = 0; k < cols; k += kStrip) {
          T* out = w.data + r * w.stride + k;
          const Strip<F> x = load_strip_n<F>(out, cols - k), update = load_packed(c + r * kTileCols + k);
          Strip<F> gain{row, row};
          if (col_gain != nullptr) gain = load_packed(col_gain + j + k);
          store_strip_n<F>(out, {(x.even + s * update.even) * gain.even, (x.odd + s * update.odd) * gain.odd},
                           cols - k);
        }
      }
      if (v.col_stride == 1) continue;
      T* out = static_cast<T*>(v.data) + i * v.row_stride + j * v.col_stride;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < cols; ++k)
          out[r * v.row_stride + k * v.col_stride] = gathered[r * kTileCols + k];
      }
    }
  }
}

LORA_FAST_CLONES void merge_float(const AdaptedWeight& v, const PackedAdapter& adapter, const void* row_gain,
                                  const void* col_gain, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T,
                     merge<float, T>(v, adapter, static_cast<const float*>(row_gain),
                                     static_cast<const float*>(col_gain), begin, end))
}

void merge_double(const AdaptedWeight& v, const PackedAdapter& adapter, const void* row_gain,
                  const void* col_gain, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T,
                     merge<double, T>(v, adapter, static_cast<const double*>(row_gain),
                                      static_cast<const double*>(col_gain), begin, end))
}

}  // namespace

void cpu::merge_weight(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                       std::optional<Tensor> gain, bool per_output) {
  check_adapter(weight, lora_A, lora_B);
  if (gain) check_wide(*gain, "gain", weight.size(per_output ? 0 : 1));
  AdaptedWeight v(weight, lora_A, lora_B, scaling);
  v.wide = v.wide || (gain && is_double(*gain));
  if (v.rows == 0 || v.cols == 0) return;
  const PackedAdapter adapter(v);
  const bool by_rows = per_output != v.transposed;
  std::optional<PackedVector> factor;
  if (gain) factor.emplace(*gain, v.wide, !by_rows && is_dealt(v.dtype));
  const void* row_gain = factor && by_rows ? factor->data() : nullptr;
  const void* col_gain = factor && !by_rows ? factor->data() : nullptr;
  const int64_t blocks = round_up(v.rows, kTileRows) / kTileRows;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kTileRows * v.cols));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    const AmxScope scope(adapter.layout.amx, adapter.layout.step);
    (v.wide ? merge_double : merge_float)(v, adapter, row_gain, col_gain, begin, end);
  });
}

}  // namespace lora_fast
