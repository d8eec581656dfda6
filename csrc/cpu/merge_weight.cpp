// W ← (W + s B A) ⊙ gain, in place, tile by tile, each element rounded once.
#include "adapted_weight.h"
#include "ops.h"

namespace lora_fast {
namespace {

// Row blocks [begin, end). row_gain and col_gain: at most one is given; col_gain is packed.
template <class F, class T>
LORA_FAST_INLINE void merge_of(const AdaptedWeight& v, const PackedAdapter& adapter, const F* row_gain,
                               const F* col_gain, int64_t begin, int64_t end) {
  const TileRange range{begin, end, 0, col_blocks(v), few_tile_rows(adapter.layout)};
  for_each_tile<F, T>(v, adapter, range, [&](const AdaptedTile<F, T>& tile) LORA_FAST_ALWAYS_INLINE {
    for (int64_t r = 0; r < tile.rows; ++r) {
      tile.fetch(r);
      const Vec<F> row = splat(row_gain != nullptr ? row_gain[tile.i + r] : F{1});
      for (int64_t k = 0; k < tile.cols; k += kStrip) {
        const Strip<F> x = tile.strip(r, k);
        Strip<F> gain{row, row};
        if (col_gain != nullptr) gain = load_packed(col_gain + tile.j + k);
        store_strip<F>(tile.w + r * tile.stride + k, {x.even * gain.even, x.odd * gain.odd});
      }
    }
    if (!tile.gathered) return;
    T* out = static_cast<T*>(v.data) + tile.i * v.row_stride + tile.j * v.col_stride;
    for (int64_t r = 0; r < tile.rows; ++r)
      copy_line(out + r * v.row_stride, v.col_stride, tile.w + r * tile.stride, 1, tile.cols);
  });
}

template <class F>
LORA_FAST_CLONES void merge(const AdaptedWeight& v, const PackedAdapter& adapter, const void* row_gain,
                            const void* col_gain, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(v.dtype, T,
                     merge_of<F, T>(v, adapter, static_cast<const F*>(row_gain),
                                    static_cast<const F*>(col_gain), begin, end))
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
  for_chunks(row_chunks(v, 65536), row_blocks(v), [&](int64_t, int64_t begin, int64_t end) {
    const AmxScope scope(adapter.layout.pairs, adapter.layout.step);
    (v.wide ? merge<double> : merge<float>)(v, adapter, row_gain, col_gain, begin, end);
  });
}

}  // namespace lora_fast
