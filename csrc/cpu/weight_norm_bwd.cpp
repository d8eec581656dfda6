// dV = c ⊙ V with c = grad / norm (0 where norm is 0), V = W + s P Q;  dP = s dV Qᵀ,  dQ = s Pᵀ dV.
// Each pass makes V's tiles anew and multiplies them while they are in the first-level cache. The two split
// the work along the axis that they do not sum over, so that no thread needs partial sums of its own.
#include "adapted_weight.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

struct NormGrad {
  const AdaptedWeight& v;
  const PackedAdapter& adapter;
  const void* coefficients;  // c, padded to whole tiles
  bool by_rows;
};

// c [rows][kTileCols] = dV at (i, j), zero past cols
template <class F, class T>
LORA_FAST_INLINE void grad_tile(const NormGrad& g, int64_t i, int64_t j, int64_t rows, int64_t cols, F* c,
                                T* gathered) {
  const F* coefficients = static_cast<const F*>(g.coefficients);
  const Vec<F> s = splat(static_cast<F>(g.v.scaling));
  rank_tile(g.adapter.layout, g.adapter.p.at(i), g.adapter.q.at(j), c, rows, cols);
  const WeightTile<T> w = weight_tile(g.v, i, j, rows, cols, gathered);
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<F> row = splat(g.by_rows ? coefficients[i + r] : F{1});
    for (int64_t k = 0; k < cols; k += kLanes) {
      F* out = c + r * kTileCols + k;
      const Vec<F> x = load_n<F>(w.data + r * w.stride + k, cols - k) + s * load_n<F>(out, cols - k);
      const Vec<F> scale = g.by_rows ? row : load<F>(coefficients + j + k);
      store<F>(out, x * scale);
    }
  }
}

// out [rows of P][width] += dV Qᵀ over the row blocks [begin, end); q_rows [cols][width] is Qᵀ
template <class F, class T>
LORA_FAST_INLINE void grad_p(const NormGrad& g, const F* q_rows, int64_t width, F* out, int64_t begin,
                             int64_t end) {
  alignas(64) F c[kTileRows * kTileCols];
  alignas(64) T gathered[kTileRows * kTileCols];
  for (int64_t i = begin * kTileRows; i < std::min(g.v.rows, end * kTileRows); i += kTileRows) {
    const int64_t rows = std::min(kTileRows, g.v.rows - i);
    for (int64_t j = 0; j < g.v.cols; j += kTileCols) {
      const int64_t cols = std::min(kTileCols, g.v.cols - j);
      grad_tile<F, T>(g, i, j, rows, cols, c, gathered);
      gemm_tile(c, kTileCols, 1, q_rows + j * width, width, out + i * width, width, rows, width, cols, j > 0);
    }
  }
}

// out [R][width] += Pᵀ dV over the column blocks [begin, end); p_rows [rows][depth] is P
template <class F, class T>
LORA_FAST_INLINE void grad_q(const NormGrad& g, const F* p_rows, int64_t depth, F* out, int64_t width,
                             int64_t begin, int64_t end) {
  alignas(64) F c[kTileRows * kTileCols];
  alignas(64) T gathered[kTileRows * kTileCols];
  for (int64_t i = 0; i < g.v.rows; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, g.v.rows - i);
    for (int64_t j = begin * kTileCols; j < std::min(g.v.cols, end * kTileCols); j += kTileCols) {
      const int64_t cols = std::min(kTileCols, g.v.cols - j);
      grad_tile<F, T>(g, i, j, rows, cols, c, gathered);
      gemm_tile(p_rows + i * depth, 1, depth, c, kTileCols, out + j, width, g.v.rank, round_up(cols, kLanes),
                rows, i > 0);
    }
  }
}

LORA_FAST_CLONES void grad_p_float(const NormGrad& g, const void* q_rows, int64_t width, void* out,
                                   int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(
      g.v.dtype, T,
      grad_p<float, T>(g, static_cast<const float*>(q_rows), width, static_cast<float*>(out), begin, end))
}

void grad_p_double(const NormGrad& g, const void* q_rows, int64_t width, void* out, int64_t begin,
                   int64_t end){
    LORA_FAST_BY_DTYPE(g.v.dtype, T,
                       grad_p<double, T>(g, static_cast<const double*>(q_rows), width,
                                         static_cast<double*>(out), begin, end))}

LORA_FAST_CLONES void grad_q_float(const NormGrad& g, const void* p_rows, int64_t depth, void* out,
                                   int64_t width, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(g.v.dtype, T,
                     grad_q<float, T>(g, static_cast<const float*>(p_rows), depth, static_cast<float*>(out),
                                      width, begin, end))
}

void grad_q_double(const NormGrad& g, const void* p_rows, int64_t depth, void* out, int64_t width,
                   int64_t begin, int64_t end){
    LORA_FAST_BY_DTYPE(g.v.dtype, T,
                       grad_q<double, T>(g, static_cast<const double*>(p_rows), depth,
                                         static_cast<double*>(out), width, begin, end))}

// The factor as [count][width] of F, whatever way the tiles are made.
RankLayout unpadded(const AdaptedWeight& v, int64_t width) {
  RankLayout layout(v.rank, false);
  layout.depth = width;
  return layout;
}

// dst[outer, r] = s · src[outer · stride_outer + r · stride_rank]
template <class F>
void write_grad(const F* src, int64_t stride_outer, int64_t stride_rank, const Tensor& out, int64_t outer_dim,
                double scaling) {
  const int64_t count = out.size(outer_dim), rank = out.size(1 - outer_dim);
  const int64_t to_outer = out.stride(outer_dim), to_rank = out.stride(1 - outer_dim);
  const F s = static_cast<F>(scaling);
  LORA_FAST_BY_DTYPE(out.scalar_type(), T, {
    T* dst = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t o = 0; o < count; ++o) {
      for (int64_t r = 0; r < rank; ++r) {
        const F x = s * src[o * stride_outer + r * stride_rank];
        convert_line(dst + o * to_outer + r * to_rank, &x, 1, 1);
      }
    }
  })
}

template <class F>
void norm_grads(const NormGrad& g, const Tensor* grad_p_out, int64_t p_dim, const Tensor* grad_q_out,
                int64_t q_dim) {
  const AdaptedWeight& v = g.v;
  if (grad_p_out != nullptr && v.rows > 0 && v.rank > 0) {
    const int64_t width = round_up(v.rank, kLanes);
    const PackedRows q_rows(v.q, v.cols, unpadded(v, width), v.wide);
    Scratch<F> out(v.rows * width);
    std::fill(out.data(), out.data() + v.rows * width, F{});
    const int64_t blocks = round_up(v.rows, kTileRows) / kTileRows;
    const int64_t grain = std::max<int64_t>(1, 32768 / (kTileRows * std::max<int64_t>(1, v.cols)));
    for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
      const AmxScope scope(g.adapter.layout.amx, g.adapter.layout.step);
      (g.v.wide ? grad_p_double : grad_p_float)(g, q_rows.at(0), width, out.data(), begin, end);
    });
    write_grad(out.data(), width, 1, *grad_p_out, p_dim, v.scaling);
  }
  if (grad_q_out != nullptr && v.cols > 0 && v.rank > 0) {
    const RankLayout layout = unpadded(v, v.rank);
    const PackedRows p_rows(v.p, v.rows, layout, v.wide);
    const int64_t width = round_up(v.cols, kLanes);
    Scratch<F> out(v.rank * width);
    std::fill(out.data(), out.data() + v.rank * width, F{});
    const int64_t blocks = round_up(v.cols, kTileCols) / kTileCols;
    const int64_t grain = std::max<int64_t>(1, 32768 / (kTileCols * std::max<int64_t>(1, v.rows)));
    for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
      const AmxScope scope(g.adapter.layout.amx, g.adapter.layout.step);
      (g.v.wide ? grad_q_double : grad_q_float)(g, p_rows.at(0), layout.depth, out.data(), width, begin, end);
    });
    write_grad(out.data(), 1, width, *grad_q_out, q_dim, v.scaling);
  }
}

// c = grad / norm, 0 where norm is 0
template <class F>
void fill_coefficients(F* c, const Tensor& grad, const Tensor& norm, int64_t padded) {
  const PackedVector g(grad, true), n(norm, true);
  const double* top = static_cast<const double*>(g.data());
  const double* bottom = static_cast<const double*>(n.data());
  const int64_t count = norm.size(0);
  for (int64_t i = 0; i < padded; ++i)
    c[i] = i < count && bottom[i] != 0 ? static_cast<F>(top[i] / bottom[i]) : F{};
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
  const PackedAdapter adapter(v);
  const Tensor* of_A = need_A ? &grad_A : nullptr;
  const Tensor* of_B = need_B ? &grad_B : nullptr;
  const Tensor* p_out = v.transposed ? of_A : of_B;
  const Tensor* q_out = v.transposed ? of_B : of_A;
  const int64_t p_dim = v.transposed ? 1 : 0, q_dim = v.transposed ? 0 : 1;
  const int64_t padded = round_up(lines, kTileCols);
  Scratch<char> coefficients(padded * (v.wide ? 8 : 4));
  const NormGrad g{v, adapter, coefficients.data(), per_output != v.transposed};
  if (v.wide) {
    fill_coefficients(reinterpret_cast<double*>(coefficients.data()), grad, norm, padded);
    norm_grads<double>(g, p_out, p_dim, q_out, q_dim);
  } else {
    fill_coefficients(reinterpret_cast<float*>(coefficients.data()), grad, norm, padded);
    norm_grads<float>(g, p_out, p_dim, q_out, q_dim);
  }
  return {grad_A, grad_B};
}

}  // namespace lora_fast
