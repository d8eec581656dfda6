// The backward of lora_linear in bfloat16, in blocks of 512 tokens:
//   dv = gain ⊙ dy   dgain = Σ_t dy ⊙ v   dbias = Σ_t dy   dh = s dv B   dB = s dvᵀ h
//   dA = dhᵀ x   dx = dv W + dh A
// One pass over dy and v gives all of the first line; the sums of dx then start from dh A, and dA is computed
// in the same loop.
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

struct Linear {
  const bf16* weight;
  int64_t ld, N, K, R, rank_panels;
  AdapterMatrix lora_B;
  const bf16* lora_A;  // [R, K]
  const float* gain;   // may be null
  float scaling;
  bool need_x, need_A, need_B;
  // Sums over the tokens, null if unwanted: [N], [N], blocks [N / 32][rank panels] with the ranks in rows,
  // and blocks [K / 32][rank steps], the same with the remainder's behind them
  float *grad_gain, *grad_bias, *grad_B, *grad_A;
};

// One block of tokens.
struct Tokens {
  const bf16 *grad_y, *product, *x, *h;  // at the first token
  int64_t count, panels;
  bool first;           // whether the sums over tokens start here
  bf16* grad_v;         // a-panels [panels][N / 32]
  bf16* h_turned;       // a-panels [rank panels][panels] of hᵀ
  float* grad_h;        // blocks [chunk][panels][rank panels]
  bf16* rank_rows;      // a-panels [panels][rank_steps] of [dh | remainder]
  bf16* grad_h_turned;  // a-panels [rank_steps][panels] of [dh | remainder]ᵀ
  bf16* grad_x;
};

int64_t rank_steps(const Linear& op) {
  return round_up(2 * op.R, kDepth) / kDepth;
}

// dv of one panel of tokens and `panels` panels of outputs from p on, and their part of dgain and dbias
template <int64_t panels>
LORA_FAST_INLINE void scale_group(const Linear& op, const Tokens& tokens, int64_t panel, int64_t p) {
  const int64_t first = panel * kPanel, count = std::min(kPanel, tokens.count - first), n = p * kPanel;
  const bool opens = tokens.first && panel == 0;
  bf16* out = tokens.grad_v + (panel * (op.N / kPanel) + p) * kPanelStep;
  Strip<float> gain[panels], dgain[panels] = {}, dbias[panels] = {};
  for (int64_t i = 0; i < panels; ++i) {
    gain[i] = {splat(1.0f), splat(1.0f)};
    if (op.gain == nullptr) continue;
    gain[i] = load_packed(op.gain + n + i * kPanel);
    deal_strip(gain[i].even, gain[i].odd);
  }
  for (int64_t t = 0; t < count; ++t) {
    const bf16* grad_y = tokens.grad_y + (first + t) * op.N + n;
    const bf16* product = tokens.product + (first + t) * op.N + n;
#pragma GCC unroll 4
    for (int64_t i = 0; i < panels; ++i) {
      __builtin_prefetch(grad_y + (panels + i) * kPanel);
      const Strip<float> g = load_strip<float>(grad_y + i * kPanel);
      if (op.grad_gain != nullptr) {
        __builtin_prefetch(product + (panels + i) * kPanel);
        const Strip<float> v = load_strip<float>(product + i * kPanel);
        dgain[i] = {dgain[i].even + g.even * v.even, dgain[i].odd + g.odd * v.odd};
      }
      dbias[i] = {dbias[i].even + g.even, dbias[i].odd + g.odd};
      store_strip<float>(out + i * kPanelStep + t * kDepth, {g.even * gain[i].even, g.odd * gain[i].odd});
    }
  }
  for (int64_t i = 0; i < panels; ++i) {
    std::memset(out + i * kPanelStep + count * kDepth, 0,
                static_cast<size_t>((kPanel - count) * kDepth) * sizeof(bf16));
    const auto add = [&](float* sums, Strip<float> part) {
      if (sums == nullptr) return;
      undeal_strip(part.even, part.odd);
      float* at = sums + n + i * kPanel;
      const Strip<float> before = opens ? Strip<float>{} : load_packed(at);
      store_packed<float>(at, {before.even + part.even, before.odd + part.odd});
    };
    add(op.grad_gain, dgain[i]);
    add(op.grad_bias, dbias[i]);
  }
}

// The same for the outputs [begin, end) in panels
LORA_FAST_CLONES void scale_panel(const Linear& op, const Tokens& tokens, int64_t panel, int64_t begin,
                                  int64_t end) {
  int64_t p = begin;
  for (; p + 4 <= end; p += 4) scale_group<4>(op, tokens, panel, p);
  for (; p < end; ++p) scale_group<1>(op, tokens, panel, p);
}

// The outputs [begin, end) in panels: dv, dgain, dbias, dB, and this chunk's part of dh / s.
void output_columns(const Linear& op, const Tokens& tokens, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t count = end - begin, width = op.rank_panels * kPanel;
  const bool need_h = op.need_x || op.need_A;
  const Scratch<bf16> factor(need_h ? count * op.rank_panels * kPanelStep : 0);
  const Scratch<bf16> rows(need_h ? kPanel * width : 0);
  for (int64_t p = 0; need_h && p < count; ++p) {
    round_rows(op.lora_B, (begin + p) * kPanel, kPanel, 1.0f, false, width, rows.data());
    pack_pairs(rows.data(), width, kPanel, op.rank_panels, factor.data() + p * kPanelStep,
               count * kPanelStep);
  }
  const Scratch<bf16> pairs(op.need_B ? count * kPanelStep : 0);
  const AmxScope scope(true, kDepth);
  for (int64_t panel = 0; panel < tokens.panels; ++panel) {
    scale_panel(op, tokens, panel, begin, end);
    const bf16* grad_v = tokens.grad_v + (panel * (op.N / kPanel) + begin) * kPanelStep;
    for (int64_t r = 0; need_h && r < op.rank_panels; ++r)
      panel_product(Streamed::b, {{grad_v, factor.data() + r * count * kPanelStep, count}},
                    tokens.grad_h + ((chunk * tokens.panels + panel) * op.rank_panels + r) * kBlock, false);
    if (!op.need_B) continue;
    for (int64_t p = 0; p < count; ++p)
      pack_pairs(grad_v + p * kPanelStep, kDepth, kPanel, 1, pairs.data() + p * kPanelStep, 0);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t r = 0; r < op.rank_panels; ++r)
        panel_product(
            Streamed::b,
            {{tokens.h_turned + (r * tokens.panels + panel) * kPanelStep, pairs.data() + p * kPanelStep, 1}},
            op.grad_B + ((begin + p) * op.rank_panels + r) * kBlock, !tokens.first || panel > 0);
  }
}

// out [tokens][R] = s times the sum of the chunks' parts of dh
LORA_FAST_CLONES void sum_rank_grads(const Linear& op, const Tokens& tokens, int64_t chunks, int64_t panel,
                                     int64_t count, float* out) {
  for (int64_t r = 0; r < op.rank_panels; ++r) {
    for (int64_t t = 0; t < count; ++t) {
      Strip<float> sum{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* row = tokens.grad_h + ((chunk * tokens.panels + panel) * op.rank_panels + r) * kBlock +
                           t / 16 * (kBlock / 2) + t % 16 * 16;
        sum = {sum.even + load<float>(row), sum.odd + load<float>(row + kBlock / 4)};
      }
      undeal_strip(sum.even, sum.odd);
      sum = {sum.even * op.scaling, sum.odd * op.scaling};
      store_strip_n<float>(out + t * op.R + r * kPanel, sum, std::min(kPanel, op.R - r * kPanel));
    }
  }
}

// Columns of m [rows][width] as rows of a-panels, one step of `panels`: column c goes to row c % 32 of panel
// c / 32.
void turn_columns(const bf16* m, int64_t rows, int64_t width, int64_t cols, int64_t panels, bf16* out) {
  for (int64_t c = 0; c < round_up(cols, kPanel); ++c) {
    bf16* to = out + c / kPanel * panels * kPanelStep + c % kPanel * kDepth;
    for (int64_t t = 0; t < kDepth; ++t) to[t] = c < cols && t < rows ? m[t * width + c] : bf16{0};
  }
}

// dh of the panels [begin, end) as the operands of dx and dA.
void gather_rank_grads(const Linear& op, const Tokens& tokens, int64_t chunks, int64_t begin, int64_t end) {
  const int64_t steps = rank_steps(op), width = steps * kDepth;
  const Scratch<bf16> rows(kPanel * width);
  const Scratch<float> sums(kPanel * op.R);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t count = std::min(kPanel, tokens.count - panel * kPanel);
    sum_rank_grads(op, tokens, chunks, panel, count, sums.data());
    round_rows(AdapterMatrix(sums.data(), true, count, op.R), 0, count, 1.0f, true, width, rows.data());
    pack_rows(rows.data(), width, count, steps, RowOrder::plain,
              tokens.rank_rows + panel * steps * kPanelStep);
    turn_columns(rows.data(), count, width, width, tokens.panels, tokens.grad_h_turned + panel * kPanelStep);
  }
}

// hᵀ of the panels [begin, end) as a-panels
void turn_projection(const Linear& op, const Tokens& tokens, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    turn_columns(tokens.h + panel * kPanel * op.R, std::min(kPanel, tokens.count - panel * kPanel), op.R,
                 op.R, tokens.panels, tokens.h_turned + panel * kPanelStep);
}

// `panels` blocks side by side, by rows
LORA_FAST_CLONES void store_blocks(const float* c, int64_t rows, int64_t panels, bf16* out, int64_t ld) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t p = 0; p < panels; ++p) {
      const float* row = c + p * kBlock + t / 16 * (kBlock / 2) + t % 16 * 16;
      store_strip<float>(out + t * ld + p * kPanel, {load<float>(row), load<float>(row + kBlock / 4)});
    }
  }
}

// dx of up to kBlockPanels panels of inputs from k on
void input_block(const Linear& op, const Tokens& tokens, int64_t first, int64_t panels, bf16* factor,
                 bf16* weight, float* sums) {
  const int64_t steps = rank_steps(op), outputs = op.N / kDepth, k = first * kPanel;
  const auto block = [&](int64_t t, int64_t p) { return sums + (t * panels + p) * kBlock; };
  // [A; A] in pairs of rows
  const int64_t width = panels * kPanel;
  const Scratch<bf16> rows(steps * kDepth * width);
  std::memset(rows.data(), 0, static_cast<size_t>(steps * kDepth * width) * sizeof(bf16));
  for (int64_t r = 0; r < 2 * op.R; ++r)
    std::memcpy(rows.data() + r * width, op.lora_A + r % op.R * op.K + k,
                static_cast<size_t>(width) * sizeof(bf16));
  for (int64_t step = 0; step < steps; ++step)
    pack_pairs(rows.data() + step * kDepth * width, width, kDepth, panels, factor + step * kPanelStep,
               steps * kPanelStep);
  for (int64_t n = 0; n < outputs; n += kBlockSteps) {
    const int64_t depth = std::min(kBlockSteps, outputs - n);
    for (int64_t step = 0; step < depth; ++step)
      pack_pairs(op.weight + (n + step) * kDepth * op.ld + k, op.ld, kDepth, panels,
                 weight + step * kPanelStep, depth * kPanelStep);
    const int64_t opening = n == 0 ? steps : 0;
    for (int64_t t = 0; t < tokens.panels; ++t)
      for (int64_t p = 0; p < panels; ++p)
        panel_product(
            Streamed::b,
            {{tokens.rank_rows + t * steps * kPanelStep, factor + p * steps * kPanelStep, opening},
             {tokens.grad_v + (t * outputs + n) * kPanelStep, weight + p * depth * kPanelStep, depth}},
            block(t, p), n > 0);
  }
  for (int64_t t = 0; t < tokens.panels; ++t)
    store_blocks(block(t, 0), std::min(kPanel, tokens.count - t * kPanel), panels,
                 tokens.grad_x + t * kPanel * op.K + k, op.K);
}

// The part of dA of up to kBlockPanels panels of inputs
void factor_block(const Linear& op, const Tokens& tokens, int64_t first, int64_t panels, bf16* pairs) {
  for (int64_t t = 0; t < tokens.panels; ++t)
    pack_pairs(tokens.x + t * kPanel * op.K + first * kPanel, op.K,
               std::min(kPanel, tokens.count - t * kPanel), panels, pairs + t * kPanelStep,
               tokens.panels * kPanelStep);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t r = 0; r < rank_steps(op); ++r)
      panel_product(Streamed::b,
                    {{tokens.grad_h_turned + r * tokens.panels * kPanelStep,
                      pairs + p * tokens.panels * kPanelStep, tokens.panels}},
                    op.grad_A + ((first + p) * rank_steps(op) + r) * kBlock, !tokens.first);
}

// The inputs [begin, end) in panels: dx and dA.
void input_columns(const Linear& op, const Tokens& tokens, int64_t begin, int64_t end) {
  const Scratch<bf16> factor(op.need_x ? kBlockPanels * rank_steps(op) * kPanelStep : 0);
  const Scratch<bf16> packed(kBlockPanels * std::max(kBlockSteps, tokens.panels) * kPanelStep);
  const Scratch<float> sums(op.need_x ? kBlockPanels * tokens.panels * kBlock : 0);
  const AmxScope scope(true, kDepth);
  for (int64_t first = begin; first < end; first += kBlockPanels) {
    const int64_t panels = std::min(kBlockPanels, end - first);
    if (op.need_A) factor_block(op, tokens, first, panels, packed.data());
    if (op.need_x) input_block(op, tokens, first, panels, factor.data(), packed.data(), sums.data());
  }
}

// out [R, K] from blocks [K / 32][rank steps], the inputs [begin, end) in panels
template <class T>
LORA_FAST_CLONES void store_grad_A(const Linear& op, T* out, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const auto load_row = [&](int64_t r) {
      const float* row = op.grad_A + (p * rank_steps(op) + r / kPanel) * kBlock +
                         r % kPanel / 16 * (kBlock / 2) + r % 16 * 16;
      return Strip<float>{load<float>(row), load<float>(row + kBlock / 4)};
    };
    for (int64_t r = 0; r < op.R; ++r) {
      const Strip<float> rounded = load_row(r), left = load_row(op.R + r);
      Strip<float> strip{rounded.even + left.even, rounded.odd + left.odd};
      if constexpr (!kDealt<T>) undeal_strip(strip.even, strip.odd);
      store_strip<float>(out + r * op.K + p * kPanel, strip);
    }
  }
}

// out [N, R] = s times blocks [N / 32][rank panels] transposed, the outputs [begin, end) in panels
template <class T>
LORA_FAST_CLONES void store_grad_B(const Linear& op, T* out, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t r = 0; r < op.R; r += 16) {
      const float* tile = op.grad_B + (p * op.rank_panels + r / kPanel) * kBlock + r % kPanel * 32;
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(16, op.R - r)) * sizeof(T);
      for (int64_t col = 0; col < kPanel; col += 8) {
        u32x16 words[8];
        transpose_words(tile + col / 16 * 256 + col % 16, 64, words);
        for (int64_t i = 0; i < 8; ++i) {
          const int64_t n = p * kPanel + 2 * ((col + i) % 16) + col / 16;
          T rounded[16];
          store<float>(rounded, (f32x16)words[i] * op.scaling);
          std::memcpy(out + n * op.R + r, rounded, bytes);
        }
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu::lora_linear_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> product, std::optional<Tensor> h, bool need_x,
    bool need_A, bool need_B, bool need_gain, bool need_bias) {
  const Needs needs{need_x, need_A, need_B, need_gain, need_bias};
  check_tiled_weight(weight);
  check_linear_bwd(grad_y, x, weight, lora_A, lora_B, gain, product, h, needs);
  const int64_t tokens = grad_y.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  Gradients grad(grad_y, weight, lora_A, lora_B, needs);

  const int64_t rank_panels = round_up(R, kPanel) / kPanel;
  const Scratch<float> sums_A(need_A ? K * round_up(2 * R, kPanel) : 0);
  const Scratch<float> sums_B(need_B ? N * rank_panels * kPanel : 0);
  const WholeRows<bf16> factor(AdapterMatrix{lora_A});
  const Linear op{elements(weight),
                  weight.stride(0),
                  N,
                  K,
                  R,
                  rank_panels,
                  AdapterMatrix(lora_B),
                  factor.data(),
                  gain ? static_cast<const float*>(gain->const_data_ptr()) : nullptr,
                  static_cast<float>(scaling),
                  need_x,
                  need_A,
                  need_B,
                  need_gain ? static_cast<float*>(grad.gain.mutable_data_ptr()) : nullptr,
                  need_bias ? static_cast<float*>(grad.bias.mutable_data_ptr()) : nullptr,
                  sums_B.data(),
                  sums_A.data()};
  const bool need_h = need_x || need_A;
  const int64_t most_panels = round_up(std::min(tokens, kTokenBlock), kPanel) / kPanel;
  // a grain of the rank, so that the chunks' parts of dh are no larger than dy
  const int64_t chunks = chunk_count(N / kPanel, rank_panels);
  const Scratch<bf16> grad_v(most_panels * kPanel * N);
  const Scratch<bf16> h_turned(need_B ? rank_panels * most_panels * kPanelStep : 0);
  const Scratch<float> grad_h(need_h ? chunks * most_panels * rank_panels * kBlock : 0);
  const Scratch<bf16> rank_rows(need_h ? most_panels * rank_steps(op) * kPanelStep : 0);
  const Scratch<bf16> grad_h_turned(need_h ? rank_steps(op) * most_panels * kPanelStep : 0);
  const auto at = [](const std::optional<Tensor>& kept, int64_t offset) {
    return kept ? elements(*kept) + offset : nullptr;
  };
  for (int64_t first = 0; first < tokens; first += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, tokens - first), panels = round_up(count, kPanel) / kPanel;
    const Tokens block{elements(grad_y) + first * N,
                       at(product, first * N),
                       at(x, first * K),
                       at(h, first * R),
                       count,
                       panels,
                       first == 0,
                       grad_v.data(),
                       h_turned.data(),
                       grad_h.data(),
                       rank_rows.data(),
                       grad_h_turned.data(),
                       need_x ? static_cast<bf16*>(grad.x.mutable_data_ptr()) + first * K : nullptr};
    const auto over_panels = [&](int64_t number, const auto& f) {
      for_chunks(chunk_count(number, 1), number, f);
    };
    if (need_B)
      over_panels(panels,
                  [&](int64_t, int64_t begin, int64_t end) { turn_projection(op, block, begin, end); });
    for_chunks(chunks, N / kPanel, [&](int64_t chunk, int64_t begin, int64_t end) {
      output_columns(op, block, chunk, begin, end);
    });
    if (!need_h) continue;
    over_panels(panels, [&](int64_t, int64_t begin, int64_t end) {
      gather_rank_grads(op, block, chunks, begin, end);
    });
    over_panels(K / kPanel,
                [&](int64_t, int64_t begin, int64_t end) { input_columns(op, block, begin, end); });
  }
  const auto store = [&](bool needed, Tensor& out, int64_t panels, const auto& store_as) {
    if (!needed) return;
    for_chunks(chunk_count(panels, 8), panels, [&](int64_t, int64_t begin, int64_t end) {
      if (out.scalar_type() == ScalarType::Float) {
        store_as(static_cast<float*>(out.mutable_data_ptr()), begin, end);
      } else {
        store_as(static_cast<bf16*>(out.mutable_data_ptr()), begin, end);
      }
    });
  };
  store(need_A, grad.A, K / kPanel,
        [&](auto* out, int64_t begin, int64_t end) { store_grad_A(op, out, begin, end); });
  store(need_B, grad.B, N / kPanel,
        [&](auto* out, int64_t begin, int64_t end) { store_grad_B(op, out, begin, end); });
  return {grad.x, grad.A, grad.B, grad.gain, grad.bias};
}

}  // namespace lora_fast
