// out = gain ⊙ v + bias with v = base + s h lora_Bᵀ, each element read and rounded once.
#include "adapted_weight.h"
#include "compose_strip.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"

namespace lora_fast {
namespace {

struct Compose {
  const void* base;  // [tokens, width]
  void* out;         // the same, may be base
  void* product;     // the same, or null
  int64_t ld_out;    // row stride of out and product
  ScalarType dtype;
  int64_t tokens, width;
  Factor lora_B;
  double scaling;
  bool wide;
  RankLayout layout;
  const PackedRows* h;  // null without columns
  const void* gain;     // packed, or null
  const void* bias;
};

// One tile: tokens [i, i + rows), columns [j, j + cols).
template <class F, class T>
LORA_FAST_INLINE void compose_tile(const Compose& op, const void* panel, int64_t i, int64_t rows, int64_t j,
                                   int64_t cols) {
  alignas(64) F c[kTileRows * kTileCols];
  const Vec<F> s = splat(static_cast<F>(op.scaling));
  const F *gain = static_cast<const F*>(op.gain), *bias = static_cast<const F*>(op.bias);
  if (op.h != nullptr) rank_tile(op.layout, op.h->at(i), panel, c, rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    const T* base = static_cast<const T*>(op.base) + (i + r) * op.width + j;
    T* out = static_cast<T*>(op.out) + (i + r) * op.ld_out + j;
    T* product = op.product != nullptr ? static_cast<T*>(op.product) + (i + r) * op.ld_out + j : nullptr;
    const F* c_row = op.h != nullptr ? c + r * kTileCols : nullptr;
    for (int64_t k = 0; k < cols; k += kStrip) {
      compose_strip<F, T>(base + k, out + k, product != nullptr ? product + k : nullptr,
                          c_row != nullptr ? c_row + k : nullptr, s, gain != nullptr ? gain + j + k : nullptr,
                          bias != nullptr ? bias + j + k : nullptr, cols - k);
    }
  }
}

// Column blocks [begin, end), all tokens: lora_B is packed one panel at a time.
template <class F, class T>
LORA_FAST_INLINE void columns_of(const Compose& op, void* panel, int64_t begin, int64_t end) {
  for (int64_t j = begin * kTileCols; j < std::min(op.width, end * kTileCols); j += kTileCols) {
    const int64_t cols = std::min(kTileCols, op.width - j);
    if (op.h != nullptr) pack_panel_into(panel, op.lora_B, op.layout, op.wide, j, cols);
    for (int64_t i = 0; i < op.tokens; i += kTileRows)
      compose_tile<F, T>(op, panel, i, std::min(kTileRows, op.tokens - i), j, cols);
  }
}

// Token blocks [begin, end), all columns: memory is passed over row by row.
template <class F, class T>
LORA_FAST_INLINE void rows_of(const Compose& op, const PackedPanels& panels, int64_t begin, int64_t end) {
  for (int64_t i = begin * kTileRows; i < std::min(op.tokens, end * kTileRows); i += kTileRows) {
    for (int64_t j = 0; j < op.width; j += kTileCols) {
      compose_tile<F, T>(op, panels.at(j), i, std::min(kTileRows, op.tokens - i), j,
                         std::min(kTileCols, op.width - j));
    }
  }
}

template <class F>
LORA_FAST_CLONES void compose_columns(const Compose& op, void* panel, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(op.dtype, T, columns_of<F, T>(op, panel, begin, end))
}

template <class F>
LORA_FAST_CLONES void compose_rows(const Compose& op, const PackedPanels& panels, int64_t begin,
                                   int64_t end) {
  LORA_FAST_BY_DTYPE(op.dtype, T, rows_of<F, T>(op, panels, begin, end))
}

// Of fewer tokens than this a whole packed lora_B would be read for little.
constexpr int64_t kManyTokens = 8 * kTileRows;

}  // namespace

void cpu::lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                           std::optional<Tensor> bias, Tensor out, std::optional<Tensor> product) {
  check_matrix(base, "base");
  check_contiguous(base, "base");
  check_matrix(h, "h");
  check_matrix(lora_B, "lora_B");
  const int64_t tokens = base.size(0), width = base.size(1), rank = h.size(1);
  check_size(h, "h", 0, tokens);
  check_size(lora_B, "lora_B", 0, width);
  check_size(lora_B, "lora_B", 1, rank);
  if (gain) check_wide(*gain, "gain", width);
  if (bias) check_vector(*bias, "bias", width);
  check_same(out, "out", base, "base");
  STD_TORCH_CHECK(out.stride(1) == 1, "out must have adjacent columns");
  if (product) {
    check_same(*product, "product", base, "base");
    STD_TORCH_CHECK(product->stride(0) == out.stride(0) && product->stride(1) == 1,
                    "product must have the strides of out");
  }
  if (tokens == 0 || width == 0) return;
  const bool wide = is_double(base) || is_double(h) || is_double(lora_B) || (gain && is_double(*gain)) ||
                    (bias && is_double(*bias));
  const Factor h_rows = factor_of(h, 0), columns = factor_of(lora_B, 0);
  const bool dealt = is_dealt(base.scalar_type());
  const RankLayout layout(rank, use_pairs(h_rows, columns, wide), dealt);
  std::optional<PackedRows> packed_h;
  std::optional<PackedVector> packed_gain, packed_bias;
  if (rank > 0) packed_h.emplace(h_rows, tokens, layout, wide);
  if (gain) packed_gain.emplace(*gain, wide, dealt);
  if (bias) packed_bias.emplace(*bias, wide, dealt);
  const Compose op{base.const_data_ptr(),
                   out.mutable_data_ptr(),
                   product ? product->mutable_data_ptr() : nullptr,
                   out.stride(0),
                   base.scalar_type(),
                   tokens,
                   width,
                   columns,
                   scaling,
                   wide,
                   layout,
                   packed_h ? &*packed_h : nullptr,
                   packed_gain ? packed_gain->data() : nullptr,
                   packed_bias ? packed_bias->data() : nullptr};
  const int64_t token_blocks = round_up(tokens, kTileRows) / kTileRows;
  const int64_t blocks = round_up(width, kTileCols) / kTileCols;
  const int64_t token_chunks = chunk_count(token_blocks, 1);
  // by blocks of tokens where there are as many as the threads, or as columns give
  if (tokens >= kManyTokens && token_chunks >= chunk_count(blocks, 1)) {
    const PackedPanels panels(columns, width, layout, wide);
    for_chunks(token_chunks, token_blocks, [&](int64_t, int64_t begin, int64_t end) {
      const AmxScope scope(layout.pairs, layout.step);
      (wide ? compose_rows<double> : compose_rows<float>)(op, panels, begin, end);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, 16384 / (kTileCols * (tokens + rank)));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    const Scratch<char> panel(layout.depth * kTileCols * packed_size(layout, wide));
    const AmxScope scope(layout.pairs, layout.step);
    (wide ? compose_columns<double> : compose_columns<float>)(op, panel.data(), begin, end);
  });
}

}  // namespace lora_fast
