// y = gain ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias in bfloat16, in blocks of 352 outputs and 512 tokens: each
// block's float32 sums start from the update, and gain and bias are applied to them at the end. The product
// is computed transposed, W xᵀ, because x is cheaper to rearrange than W.
#include "factored_norm.h"
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

struct Linear {
  const bf16* weight;
  int64_t ld, N, K;
  AdapterMatrix lora_B;
  float scaling;
  bool split;  // whether s B needs its remainder in bfloat16
  const float *gain, *bias;
  const FactoredNorm* factored;  // null where the norm is not wanted; else
  const bf16* parts;             // its parts of A as b-panels,
  const DoraGain* dora;          // whose norm and gain are written
};

// One block of tokens; x and h packed as b-panels, h in rank_steps steps, once or with its copy behind it.
struct Tokens {
  const bf16 *x, *h;
  int64_t count, panels, rank_steps;
  bf16 *y, *product;    // at the first token
  int64_t norm_panels;  // of the parts, in the first block of tokens; else none
};

// f(token, strip) for eight tokens of a block c whose rows are 32 outputs, de-interleaved.
template <class F>
LORA_FAST_INLINE void for_turned(const float* c, int64_t first, int64_t tokens, const F& f) {
  u32x16 even[8], odd[8];
  const float* from = c + first / 16 * 256 + first % 16;
  transpose_words(from, 64, even);
  transpose_words(from + kBlock / 2, 64, odd);
  for (int64_t i = 0; i < std::min<int64_t>(8, tokens - first); ++i)
    f(first + i, Strip<float>{(f32x16)even[i], (f32x16)odd[i]});
}

// The blocks of one panel of tokens and `panels` panels of outputs, by rows of y: few pages at a time.
LORA_FAST_CLONES void finish_blocks(const Linear& op, const Tokens& tokens, const float* sums, int64_t panels,
                                    int64_t n, int64_t first) {
  const int64_t count = std::min(kPanel, tokens.count - first);
  for (int64_t t = 0; t < count; t += 8) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t col = n + p * kPanel;
      Strip<float> gain = load_packed(op.gain + col), bias{};
      deal_strip(gain.even, gain.odd);
      if (op.bias != nullptr) {
        bias = load_packed(op.bias + col);
        deal_strip(bias.even, bias.odd);
      }
      for_turned(sums + p * kBlock, t, count, [&](int64_t token, Strip<float> v) {
        const int64_t at = (first + token) * op.N + col;
        if (tokens.product != nullptr) store_strip<float>(tokens.product + at, v);
        store_strip<float>(tokens.y + at, {v.even * gain.even + bias.even, v.odd * gain.odd + bias.odd});
      });
    }
  }
}

LORA_FAST_CLONES void store_projection(const float* c, int64_t tokens, bf16* h, int64_t R, int64_t cols) {
  for (int64_t first = 0; first < tokens; first += 8)
    for_turned(c, first, tokens,
               [&](int64_t t, Strip<float> v) { store_strip_n<float>(h + t * R, v, cols); });
}

// The norms and gains of one panel of outputs from n on, whose U are the blocks at sums, `stride` apart.
void finish_norms(const Linear& op, int64_t norm_panels, const float* squares, const float* sums,
                  int64_t stride, int64_t n, float* u) {
  const int64_t width = norm_panels * kPanel;
  for (int64_t panel = 0; panel < norm_panels; ++panel)
    for (int64_t row = 0; row < kPanel; ++row)
      for (int64_t half = 0; half < 2; ++half)
        std::memcpy(u + row * width + panel * kPanel + half * 16,
                    sums + panel * stride + row % 2 * (kBlock / 2) + half * 256 + row / 2 * 16,
                    16 * sizeof(float));
  op.factored->finish(n, squares, u, width, op.dora->magnitude + n, op.dora->norm + n,
                      op.dora->gain.data() + n);
}

// Panels [begin, end) of 32 outputs.
void forward_rows(const Linear& op, const Tokens& tokens, int64_t begin, int64_t end) {
  const int64_t steps = op.K / kDepth, rank_steps = tokens.rank_steps;
  const Scratch<bf16> weight(kBlockPanels * kBlockSteps * kPanelStep);
  const Scratch<bf16> factor(kBlockPanels * rank_steps * kPanelStep), rows(rank_steps * kPanelStep);
  const int64_t norm_panels = tokens.norm_panels, all_panels = tokens.panels + norm_panels;
  const Scratch<float> sums(kBlockPanels * all_panels * kBlock);
  const Scratch<float> u(norm_panels * kBlock);
  const AmxScope scope(true, kDepth);
  for (int64_t first = begin; first < end; first += kBlockPanels) {
    const int64_t panels = std::min(kBlockPanels, end - first);
    const auto block = [&](int64_t t, int64_t p) { return sums.data() + (t * panels + p) * kBlock; };
    for (int64_t p = 0; p < panels; ++p) {
      round_rows(op.lora_B, (first + p) * kPanel, kPanel, op.scaling, op.split, rank_steps * kDepth,
                 rows.data());
      pack_rows(rows.data(), rank_steps * kDepth, kPanel, rank_steps, RowOrder::dealt,
                factor.data() + p * rank_steps * kPanelStep);
    }
    alignas(64) float squares[kBlockPanels * kPanel] = {};
    for (int64_t k = 0; k < steps; k += kBlockSteps) {
      const int64_t depth = std::min(kBlockSteps, steps - k);
      for (int64_t p = 0; p < panels; ++p) {
        const bf16* rows_here = op.weight + (first + p) * kPanel * op.ld + k * kDepth;
        pack_rows(rows_here, op.ld, kPanel, depth, RowOrder::dealt, weight.data() + p * depth * kPanelStep);
        if (norm_panels > 0)
          tiles_squares(rows_here, op.ld, depth * kDepth, squares + p * kPanel, {nullptr, 0});
      }
      const int64_t opening = k == 0 ? rank_steps : 0;
      for (int64_t t = 0; t < tokens.panels; ++t)
        for (int64_t p = 0; p < panels; ++p)
          panel_product(
              Streamed::a,
              {{factor.data() + p * rank_steps * kPanelStep, tokens.h + t * rank_steps * kPanelStep, opening},
               {weight.data() + p * depth * kPanelStep, tokens.x + (t * steps + k) * kPanelStep, depth}},
              block(t, p), k > 0);
      for (int64_t t = 0; t < norm_panels; ++t)
        for (int64_t p = 0; p < panels; ++p)
          panel_product(
              Streamed::a,
              {{weight.data() + p * depth * kPanelStep, op.parts + (t * steps + k) * kPanelStep, depth}},
              block(tokens.panels + t, p), k > 0);
    }
    for (int64_t p = 0; p < panels && norm_panels > 0; ++p)
      finish_norms(op, norm_panels, squares + p * kPanel, block(tokens.panels, p), panels * kBlock,
                   (first + p) * kPanel, u.data());
    for (int64_t t = 0; t < tokens.panels; ++t)
      finish_blocks(op, tokens, block(t, 0), panels, first * kPanel, t * kPanel);
  }
}

// Panels [begin, end) of 32 tokens: x packed, h = x lora_Aᵀ, h packed.
void project_tokens(const bf16* x, int64_t count, int64_t K, const bf16* lora_A, int64_t R, bool split,
                    int64_t rank_steps, bf16* packed_x, bf16* h, bf16* packed_h, int64_t begin, int64_t end) {
  const int64_t steps = K / kDepth, width = rank_steps * kDepth;
  alignas(64) float c[kBlock];
  const Scratch<bf16> wide(kPanel * width);
  const AmxScope scope(true, kDepth);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel, tokens = std::min(kPanel, count - first);
    bf16* b = packed_x + panel * steps * kPanelStep;
    pack_columns(x + first * K, K, tokens, steps, b);
    for (int64_t r = 0; r < R; r += kPanel) {
      panel_product(Streamed::a, {{lora_A + r * K, b, steps}}, c, false);
      store_projection(c, tokens, h + first * R + r, R, std::min(kPanel, R - r));
    }
    std::memset(wide.data(), 0, static_cast<size_t>(kPanel * width) * sizeof(bf16));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t copy = 0; copy < (split ? 2 : 1); ++copy)
        std::memcpy(wide.data() + t * width + copy * R, h + (first + t) * R,
                    static_cast<size_t>(R) * sizeof(bf16));
    pack_columns(wide.data(), width, kPanel, rank_steps, packed_h + panel * rank_steps * kPanelStep);
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
               double scaling, const float* gain, const std::optional<Tensor>& bias, Tensor& y,
               std::optional<Tensor>& product, const DoraGain* dora) {
  const int64_t tokens = x.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  const int64_t h_size[] = {tokens, R};
  Tensor h = torch::stable::new_empty(x, {h_size, 2});
  auto* h_data = static_cast<bf16*>(h.mutable_data_ptr());

  std::optional<FactoredNorm> factored;
  if (dora != nullptr && !dora->known) factored.emplace(weight, lora_A, lora_B, scaling, true);
  const int64_t steps = K / kDepth;
  const int64_t norm_panels = factored ? round_up(factored->columns(), kPanel) / kPanel : 0;
  const Scratch<bf16> packed_parts(norm_panels * steps * kPanelStep);
  for_chunks(chunk_count(norm_panels, 1), norm_panels, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      pack_columns(factored->parts() + panel * kPanel * K, K, factored->columns() - panel * kPanel, steps,
                   packed_parts.data() + panel * steps * kPanelStep);
  });
  Linear op{elements(weight),
            weight.stride(0),
            N,
            K,
            AdapterMatrix(lora_B),
            static_cast<float>(scaling),
            lora_B.scalar_type() == ScalarType::Float || !keeps_bf16(scaling),
            gain,
            bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
            factored ? &*factored : nullptr,
            packed_parts.data(),
            dora};
  const int64_t rank_steps = round_up(op.split ? 2 * R : R, kDepth) / kDepth;
  const int64_t most_panels = round_up(std::min(tokens, kTokenBlock), kPanel) / kPanel;
  const Scratch<bf16> packed_A(round_up(R, kPanel) * K);
  const WholeRows<bf16> factor(AdapterMatrix{lora_A});
  for (int64_t r = 0; r < R; r += kPanel)
    pack_rows(factor.data() + r * K, K, std::min(kPanel, R - r), steps, RowOrder::dealt,
              packed_A.data() + r * K);
  const Scratch<bf16> packed_x(most_panels * steps * kPanelStep);
  const Scratch<bf16> packed_h(most_panels * rank_steps * kPanelStep);
  for (int64_t first = 0; first < tokens; first += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, tokens - first), panels = round_up(count, kPanel) / kPanel;
    for_chunks(chunk_count(panels, 1), panels, [&](int64_t, int64_t begin, int64_t end) {
      project_tokens(elements(x) + first * K, count, K, packed_A.data(), R, op.split, rank_steps,
                     packed_x.data(), h_data + first * R, packed_h.data(), begin, end);
    });
    const Tokens block{packed_x.data(),
                       packed_h.data(),
                       count,
                       panels,
                       rank_steps,
                       static_cast<bf16*>(y.mutable_data_ptr()) + first * N,
                       product ? static_cast<bf16*>(product->mutable_data_ptr()) + first * N : nullptr,
                       first == 0 ? norm_panels : 0};
    for_chunks(chunk_count(N / kPanel, 1), N / kPanel,
               [&](int64_t, int64_t begin, int64_t end) { forward_rows(op, block, begin, end); });
  }
  return h;
}

}  // namespace

Tensor cpu::lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                            Tensor gain, std::optional<Tensor> bias, Tensor y,
                            std::optional<Tensor> product) {
  check_tiled_weight(weight);
  check_linear_fwd(x, weight, lora_A, lora_B, gain, bias, y, product);
  return forward(x, weight, lora_A, lora_B, scaling, static_cast<const float*>(gain.const_data_ptr()), bias,
                 y, product, nullptr);
}

Tensor cpu::dora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                            Tensor magnitude, std::optional<Tensor> bias, Tensor y,
                            std::optional<Tensor> product, Tensor norm, bool norm_known) {
  check_tiled_weight(weight);
  check_linear_fwd(x, weight, lora_A, lora_B, magnitude, bias, y, product, "magnitude");
  const DoraGain dora(magnitude, norm, norm_known);
  return forward(x, weight, lora_A, lora_B, scaling, dora.gain.data(), bias, y, product, &dora);
}

}  // namespace lora_fast
