// dV = c ⊙ V with c = grad / norm (0 where norm is 0), V = W + s P Q;  dP = s dV Qᵀ,  dQ = s Pᵀ dV.
// Each pass makes V's tiles anew and multiplies them while they are in the first-level cache. The two split
// the work along the axis that they do not sum over, so that no thread needs partial sums of its own.
#include "adapted_weight.h"
#include "ops.h"

namespace lora_fast {
namespace {

struct NormGrad {
  const AdaptedWeight& v;
  const PackedAdapter& adapter;
  const void* coefficients;  // c, packed
  bool by_rows;
};

// dV in the place of P Q's elements: zero too past the tile's columns to the end of their strip
template <class F, class T>
LORA_FAST_INLINE void make_grad(const NormGrad& g, const AdaptedTile<F, T>& tile) {
  const F* coefficients = static_cast<const F*>(g.coefficients);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Vec<F> row = splat(g.by_rows ? coefficients[tile.i + r] : F{1});
    for (int64_t k = 0; k < tile.cols; k += kStrip) {
      const Strip<F> x = tile.strip(r, k);
      Strip<F> scale{row, row};
      if (!g.by_rows) scale = load_packed(coefficients + tile.j + k);
      store_packed<F>(tile.update + r * kTileCols + k, {x.even * scale.even, x.odd * scale.odd});
    }
  }
}

// out [rows of P][width] += dV Qᵀ over the row blocks [begin, end); q_rows [cols][width] is Qᵀ
template <class F, class T>
LORA_FAST_INLINE void grad_p_of(const NormGrad& g, const F* q_rows, int64_t width, F* out, int64_t begin,
                                int64_t end) {
  const TileRange range{begin, end, 0, col_blocks(g.v)};
  for_each_tile<F, T>(g.v, g.adapter, range, [&](const AdaptedTile<F, T>& tile) LORA_FAST_ALWAYS_INLINE {
    make_grad(g, tile);
    gemm_tile(tile.update, kTileCols, 1, q_rows + tile.j * width, width, out + tile.i * width, width,
              tile.rows, width, round_up(tile.cols, kStrip), tile.j > 0);
  });
}

// out [R][width] += Pᵀ dV over the column blocks [begin, end); p_rows [rows][depth] is P
template <class F, class T>
LORA_FAST_INLINE void grad_q_of(const NormGrad& g, const F* p_rows, int64_t depth, F* out, int64_t width,
                                int64_t begin, int64_t end) {
  const TileRange range{0, row_blocks(g.v), begin, end};
  for_each_tile<F, T>(g.v, g.adapter, range, [&](const AdaptedTile<F, T>& tile) LORA_FAST_ALWAYS_INLINE {
    make_grad(g, tile);
    gemm_tile(p_rows + tile.i * depth, 1, depth, tile.update, kTileCols, out + tile.j, width, g.v.rank,
              round_up(tile.cols, kStrip), tile.rows, tile.i > 0);
  });
}

template <class F>
LORA_FAST_CLONES void grad_p(const NormGrad& g, const F* q_rows, int64_t width, F* out, int64_t begin,
                             int64_t end) {
  LORA_FAST_BY_DTYPE(g.v.dtype, T, grad_p_of<F, T>(g, q_rows, width, out, begin, end))
}

template <class F>
LORA_FAST_CLONES void grad_q(const NormGrad& g, const F* p_rows, int64_t depth, F* out, int64_t width,
                             int64_t begin, int64_t end){
    LORA_FAST_BY_DTYPE(g.v.dtype, T, grad_q_of<F, T>(g, p_rows, depth, out, width, begin, end))}

// A factor's rows, unpadded but for width, whatever way the tiles are made.
RankLayout plain_rows(const AdaptedWeight& v, int64_t width) {
  RankLayout layout(v.rank, false, false);
  layout.depth = width;
  return layout;
}

// rows [whole strips][width] from the order of V's columns to that of strips
template <class F>
void deal_rows(F* rows, int64_t count, int64_t width) {
  Scratch<F> strip(kStrip * width);
  for (int64_t o = 0; o < count; o += kStrip, rows += kStrip * width) {
    std::copy(rows, rows + kStrip * width, strip.data());
    for (int64_t c = 0; c < kStrip; ++c)
      std::copy_n(strip.data() + c * width, width, rows + dealt_position(c) * width);
  }
}

// out[outer, r] = s · src[outer · stride_outer + r · stride_rank]
template <class F>
void write_grad(const F* src, int64_t stride_outer, int64_t stride_rank, bool dealt, const Tensor& out,
                int64_t outer_dim, double scaling) {
  const int64_t count = out.size(outer_dim), rank = out.size(1 - outer_dim);
  const int64_t to_outer = out.stride(outer_dim), to_rank = out.stride(1 - outer_dim);
  const F s = static_cast<F>(scaling);
  LORA_FAST_BY_DTYPE(out.scalar_type(), T, {
    T* dst = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t o = 0; o < count; ++o) {
      const F* from = src + (dealt ? dealt_position(o) : o) * stride_outer;
      for (int64_t r = 0; r < rank; ++r) {
        const F x = s * from[r * stride_rank];
        convert_line(dst + o * to_outer + r * to_rank, &x, 1, 1);
      }
    }
  })
}

struct GradOut {
  const Tensor* tensor;  // null where not needed
  int64_t outer_dim;     // its dimension along V's
};

template <class F>
void norm_grads(const NormGrad& g, GradOut p_out, GradOut q_out) {
  const AdaptedWeight& v = g.v;
  const RankLayout& tiles = g.adapter.layout;
  if (p_out.tensor != nullptr) {
    const int64_t width = round_up(v.rank, kLanes), padded = round_up(v.cols, kStrip);
    Scratch<F> q_rows(padded * width), out(v.rows * width);
    pack_rows_into(q_rows.data(), v.q, plain_rows(v, width), v.wide, 0, v.cols);
    std::fill(q_rows.data() + v.cols * width, q_rows.data() + padded * width, F{});
    if (tiles.dealt) deal_rows(q_rows.data(), v.cols, width);
    for_chunks(row_chunks(v, 32768), row_blocks(v), [&](int64_t, int64_t begin, int64_t end) {
      const AmxScope scope(tiles.pairs, tiles.step);
      grad_p<F>(g, q_rows.data(), width, out.data(), begin, end);
    });
    write_grad(out.data(), width, 1, false, *p_out.tensor, p_out.outer_dim, v.scaling);
  }
  if (q_out.tensor != nullptr) {
    const int64_t width = round_up(v.cols, kStrip);
    Scratch<F> p_rows(v.rows * v.rank), out(v.rank * width);
    pack_rows_into(p_rows.data(), v.p, plain_rows(v, v.rank), v.wide, 0, v.rows);
    const int64_t blocks = col_blocks(v);
    const int64_t grain = std::max<int64_t>(1, 32768 / (kTileCols * v.rows));
    for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
      const AmxScope scope(tiles.pairs, tiles.step);
      grad_q<F>(g, p_rows.data(), v.rank, out.data(), width, begin, end);
    });
    write_grad(out.data(), 1, width, tiles.dealt, *q_out.tensor, q_out.outer_dim, v.scaling);
  }
}

// c = grad / norm, 0 where norm is 0
template <class F>
void fill_coefficients(F* c, const Tensor& grad, const Tensor& norm, int64_t padded, bool dealt) {
  const PackedVector g(grad, true, dealt), n(norm, true, dealt);
  const double* top = static_cast<const double*>(g.data());
  const double* bottom = static_cast<const double*>(n.data());
  for (int64_t i = 0; i < padded; ++i) c[i] = bottom[i] != 0 ? static_cast<F>(top[i] / bottom[i]) : F{};
}

}  // namespace

std::tuple<Tensor, Tensor> cpu::weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A,
                                                Tensor lora_B, double scaling, bool per_output, bool need_A,
                                                bool need_B) {
  check_adapter(weight, lora_A, lora_B);
  const int64_t lines = weight.size(per_output ? 0 : 1);
  check_wide(grad, "grad", lines);
  check_wide(norm, "norm", lines);
  AdaptedWeight v(weight, lora_A, lora_B, scaling);
  v.wide = v.wide || is_double(grad) || is_double(norm);
  const int64_t none[] = {0}, size_A[] = {v.rank, weight.size(1)}, size_B[] = {weight.size(0), v.rank};
  Tensor grad_A =
      need_A ? torch::stable::new_empty(lora_A, {size_A, 2}) : torch::stable::new_empty(lora_A, {none, 1});
  Tensor grad_B =
      need_B ? torch::stable::new_empty(lora_B, {size_B, 2}) : torch::stable::new_empty(lora_B, {none, 1});
  if (!need_A && !need_B) return {grad_A, grad_B};
  if (v.rows == 0 || v.cols == 0 || v.rank == 0) {
    torch::stable::zero_(grad_A);
    torch::stable::zero_(grad_B);
    return {grad_A, grad_B};
  }
  const PackedAdapter adapter(v);
  const GradOut of_A{need_A ? &grad_A : nullptr, 1}, of_B{need_B ? &grad_B : nullptr, 0};
  const GradOut p_out = v.transposed ? of_A : of_B, q_out = v.transposed ? of_B : of_A;
  const int64_t padded = round_up(lines, kTileCols);
  Scratch<char> coefficients(padded * (v.wide ? 8 : 4));
  const NormGrad g{v, adapter, coefficients.data(), per_output != v.transposed};
  const bool dealt = !g.by_rows && adapter.layout.dealt;
  if (v.wide) {
    fill_coefficients(reinterpret_cast<double*>(coefficients.data()), grad, norm, padded, dealt);
    norm_grads<double>(g, p_out, q_out);
  } else {
    fill_coefficients(reinterpret_cast<float*>(coefficients.data()), grad, norm, padded, dealt);
    norm_grads<float>(g, p_out, q_out);
  }
  return {grad_A, grad_B};
}

}  // namespace lora_fast
