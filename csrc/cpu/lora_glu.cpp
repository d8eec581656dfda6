// a = act(z_gate) ⊙ z_up with z_p = gain_p ⊙ v_p + bias_p, v_p = base_p + s_p h_p lora_B_pᵀ, and its
// gradients, from the base products. The threads split the columns, so that sums over tokens do not depend on
// how many there are.
#include "activation.h"
#include "adapted_weight.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"
#include "token_sums.h"

namespace lora_fast {
namespace {

// Gate or up.
struct Side {
  const void* base;  // [tokens, width], rows `ld` apart
  int64_t ld;
  Factor lora_B;
  double scaling;
  RankLayout layout;
  const PackedRows* h;  // null without an adapter
  const void* gain;     // packed, or null
  const void* bias;
  void* grad;  // to base, rows `ld_grad` apart; null in forward
  int64_t ld_grad;
  void* grad_gain;  // [width] or null
  void* grad_bias;
};

struct Glu {
  Side sides[2];
  Activation activation;
  ScalarType dtype;
  int64_t tokens, width;
  bool wide;
  void* output;      // [tokens, width] or null
  const void* grad;  // the same; null in forward
};

template <class F>
struct Z {
  Strip<F> v, z;
};

// c, gain and bias in the order of strips, or null
template <class F, class T>
LORA_FAST_INLINE Z<F> z_strip(const T* base, const F* c, Vec<F> scaling, const F* gain, const F* bias,
                              int64_t n) {
  Strip<F> v = load_strip_n<F>(base, n);
  if (c != nullptr) {
    const Strip<F> update = load_packed(c);
    v = {v.even + scaling * update.even, v.odd + scaling * update.odd};
  }
  Strip<F> z = v;
  if (gain != nullptr) {
    const Strip<F> g = load_packed(gain);
    z = {z.even * g.even, z.odd * g.odd};
  }
  if (bias != nullptr) {
    const Strip<F> b = load_packed(bias);
    z = {z.even + b.even, z.odd + b.odd};
  }
  return {v, z};
}

template <class F>
struct ColumnSums {
  Sums<F, kTileCols> gain[2], bias[2];
};

// At row t and the strip at column j + k, of which the first n columns are there.
struct StripPlace {
  int64_t t, j, k, n;
};

template <class F, class T>
LORA_FAST_INLINE void forward_strip(const Glu& op, const StripPlace& at, const Z<F>& gate, const Z<F>& up) {
  const Activated<F> even = activated<F>(gate.z.even, op.activation),
                     odd = activated<F>(gate.z.odd, op.activation);
  store_strip_n<F>(static_cast<T*>(op.output) + at.t * op.width + at.j + at.k,
                   {even.value * up.z.even, odd.value * up.z.odd}, at.n);
}

// The gradients of one strip; those to gains and biases are added to `parts`: of gate's gain and up's, and
// the biases'.
template <class F, class T>
LORA_FAST_INLINE void backward_strip(const Glu& op, const StripPlace& at, const Z<F>& gate, const Z<F>& up,
                                     Strip<F> (&parts)[4]) {
  const int64_t column = at.j + at.k;
  const Activated<F> even = activated<F>(gate.z.even, op.activation),
                     odd = activated<F>(gate.z.odd, op.activation);
  const Strip<F> grad = load_strip_n<F>(static_cast<const T*>(op.grad) + at.t * op.width + column, at.n);
  if (op.output != nullptr)
    store_strip_n<F>(static_cast<T*>(op.output) + at.t * op.width + column,
                     {even.value * up.z.even, odd.value * up.z.odd}, at.n);
  const Strip<F> grads[2] = {
      {grad.even * up.z.even * even.slope, grad.odd * up.z.odd * odd.slope},
      {grad.even * even.value, grad.odd * odd.value},
  };
  const Strip<F> products[2] = {gate.v, up.v};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Side& side = op.sides[i];
    Strip<F> scaled = grads[i];
    if (side.gain != nullptr) {
      const Strip<F> g = load_packed(static_cast<const F*>(side.gain) + column);
      scaled = {scaled.even * g.even, scaled.odd * g.odd};
    }
    store_strip_n<F>(static_cast<T*>(side.grad) + at.t * side.ld_grad + column, scaled, at.n);
    parts[i].even += grads[i].even * products[i].even;
    parts[i].odd += grads[i].odd * products[i].odd;
    parts[2 + i].even += grads[i].even;
    parts[2 + i].odd += grads[i].odd;
  }
}

// One tile: tokens [t, t + rows), columns [j, j + cols); `updates` are h lora_Bᵀ of gate and up there, or
// null.
template <class F, class T>
LORA_FAST_INLINE void tile_of(const Glu& op, int64_t t, int64_t rows, int64_t j, int64_t cols,
                              const F* (&updates)[2], ColumnSums<F>* sums) {
  const auto z_of = [&](int i, int64_t r, int64_t k) LORA_FAST_ALWAYS_INLINE {
    const Side& side = op.sides[i];
    const F *gain = static_cast<const F*>(side.gain), *bias = static_cast<const F*>(side.bias);
    return z_strip<F, T>(static_cast<const T*>(side.base) + (t + r) * side.ld + j + k,
                         updates[i] != nullptr ? updates[i] + r * kTileCols + k : nullptr,
                         splat(static_cast<F>(side.scaling)), gain != nullptr ? gain + j + k : nullptr,
                         bias != nullptr ? bias + j + k : nullptr, cols - k);
  };
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t last = std::min(rows, first + kGroup);
    for (int64_t k = 0; k < cols; k += kStrip) {
      if (op.grad == nullptr) {
        for (int64_t r = first; r < last; ++r)
          forward_strip<F, T>(op, {t + r, j, k, cols - k}, z_of(0, r, k), z_of(1, r, k));
        continue;
      }
      Strip<F> parts[4] = {};
      for (int64_t r = first; r < last; ++r)
        backward_strip<F, T>(op, {t + r, j, k, cols - k}, z_of(0, r, k), z_of(1, r, k), parts);
      for (int i = 0; i < 2; ++i) {
        sums->gain[i].add(k, parts[i]);
        sums->bias[i].add(k, parts[2 + i]);
      }
    }
    if (op.grad == nullptr) continue;
    const int64_t groups = (t + first) / kGroup + 1;
    for (int i = 0; i < 2; ++i) {
      sums->gain[i].carry(groups, cols);
      sums->bias[i].carry(groups, cols);
    }
  }
}

// Blocks of columns [begin, end), all tokens.
template <class F, class T>
LORA_FAST_INLINE void columns_of(const Glu& op, void* const (&panels)[2], int64_t begin, int64_t end) {
  alignas(64) F c[2][kTileRows * kTileCols];
  const F* updates[2] = {op.sides[0].h != nullptr ? c[0] : nullptr,
                         op.sides[1].h != nullptr ? c[1] : nullptr};
  for (int64_t j = begin * kTileCols; j < std::min(op.width, end * kTileCols); j += kTileCols) {
    const int64_t cols = std::min(kTileCols, op.width - j);
    for (int i = 0; i < 2; ++i) {
      const Side& side = op.sides[i];
      if (side.h != nullptr) pack_panel_into(panels[i], side.lora_B, side.layout, op.wide, j, cols);
    }
    ColumnSums<F> sums;
    for (int64_t t = 0; t < op.tokens; t += kTileRows) {
      const int64_t rows = std::min(kTileRows, op.tokens - t);
      for (int i = 0; i < 2; ++i) {
        const Side& side = op.sides[i];
        if (side.h != nullptr) rank_tile(side.layout, side.h->at(t), panels[i], c[i], rows, cols);
      }
      tile_of<F, T>(op, t, rows, j, cols, updates, &sums);
    }
    for (int i = 0; i < 2; ++i) {
      write_sums(op.sides[i].grad_gain, sums.gain[i].total(cols), j, cols, kDealt<T>);
      write_sums(op.sides[i].grad_bias, sums.bias[i].total(cols), j, cols, kDealt<T>);
    }
  }
}

template <class F>
LORA_FAST_CLONES void run_columns(const Glu& op, void* const (&panels)[2], int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(op.dtype, T, columns_of<F, T>(op, panels, begin, end))
}

// The arguments of a side, as they come, and what is packed of them.
struct Given {
  const char* name;
  const Tensor& base;
  const std::optional<Tensor>&h, &lora_B;
  double scaling;
  const std::optional<Tensor>&gain, &bias;
  std::optional<PackedRows> packed_h;
  std::optional<PackedVector> packed_gain, packed_bias;

  int64_t rank() const { return h ? h->size(1) : 0; }

  bool is_double_any() const {
    const auto wide = [](const std::optional<Tensor>& t) { return t && is_double(*t); };
    return is_double(base) || wide(h) || wide(lora_B) || wide(gain) || wide(bias);
  }

  bool takes_pairs(bool wide) const {
    return rank() > 0 && use_pairs(factor_of(*h, 0), factor_of(*lora_B, 0), wide);
  }

  void check(const Tensor& like) const {
    check_same(base, name, like, "base_gate");
    STD_TORCH_CHECK(base.size(1) == 1 || base.stride(1) == 1, name, "'s base must have adjacent columns");
    STD_TORCH_CHECK(h.has_value() == lora_B.has_value(), name, ": h and lora_B must be given together");
    if (h) {
      check_matrix(*h, "h");
      check_matrix(*lora_B, "lora_B");
      check_size(*h, "h", 0, base.size(0));
      check_size(*lora_B, "lora_B", 0, base.size(1));
      check_size(*lora_B, "lora_B", 1, rank());
    }
    if (gain) check_wide(*gain, "gain", base.size(1));
    if (bias) check_vector(*bias, "bias", base.size(1));
  }

  Side packed(bool pairs, bool wide) {
    const bool dealt = is_dealt(base.scalar_type());
    const RankLayout layout(rank(), pairs, dealt);
    if (rank() > 0) packed_h.emplace(factor_of(*h, 0), base.size(0), layout, wide);
    if (gain) packed_gain.emplace(*gain, wide, dealt);
    if (bias) packed_bias.emplace(*bias, wide, dealt);
    return {base.const_data_ptr(),
            base.stride(0),
            rank() > 0 ? factor_of(*lora_B, 0) : Factor{},
            scaling,
            layout,
            packed_h ? &*packed_h : nullptr,
            packed_gain ? packed_gain->data() : nullptr,
            packed_bias ? packed_bias->data() : nullptr,
            nullptr,
            0,
            nullptr,
            nullptr};
  }
};

Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "activation must be 0, 1 or 2, got ", number);
  return static_cast<Activation>(number);
}

Glu glu_of(Given& gate, Given& up, int64_t activation) {
  gate.check(gate.base);
  up.check(gate.base);
  const bool wide = gate.is_double_any() || up.is_double_any();
  bool pairs[2] = {gate.takes_pairs(wide), up.takes_pairs(wide)};
  // a thread's tiles are configured for one depth
  const auto step = [](int64_t rank) { return RankLayout(rank, true, false).step; };
  if (amx_enabled() && gate.rank() > 0 && up.rank() > 0 &&
      (pairs[0] != pairs[1] || step(gate.rank()) != step(up.rank())))
    pairs[0] = pairs[1] = false;
  return {{gate.packed(pairs[0], wide), up.packed(pairs[1], wide)},
          activation_of(activation),
          gate.base.scalar_type(),
          gate.base.size(0),
          gate.base.size(1),
          wide,
          nullptr,
          nullptr};
}

void run(const Glu& op) {
  if (op.width == 0) return;
  const int64_t blocks = round_up(op.width, kTileCols) / kTileCols;
  const int64_t grain = std::max<int64_t>(1, 8192 / (kTileCols * std::max<int64_t>(1, op.tokens)));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    const auto bytes = [&](const Side& side) {
      return side.layout.depth * kTileCols * packed_size(side.layout, op.wide);
    };
    const Scratch<char> gate(bytes(op.sides[0])), up(bytes(op.sides[1]));
    void* const panels[2] = {gate.data(), up.data()};
    const RankLayout& layout = op.sides[op.sides[0].layout.pairs ? 0 : 1].layout;
    const AmxScope scope(layout.pairs, layout.step);
    (op.wide ? run_columns<double> : run_columns<float>)(op, panels, begin, end);
  });
}

}  // namespace

Tensor cpu::lora_glu_fwd(Tensor base_gate, Tensor base_up, std::optional<Tensor> h_gate,
                         std::optional<Tensor> h_up, std::optional<Tensor> lora_B_gate,
                         std::optional<Tensor> lora_B_up, double scaling_gate, double scaling_up,
                         std::optional<Tensor> gain_gate, std::optional<Tensor> gain_up,
                         std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up, int64_t activation) {
  check_matrix(base_gate, "base_gate");
  Given gate{"gate", base_gate, h_gate, lora_B_gate, scaling_gate, gain_gate, bias_gate};
  Given up{"up", base_up, h_up, lora_B_up, scaling_up, gain_up, bias_up};
  Glu op = glu_of(gate, up, activation);
  const int64_t whole[] = {op.tokens, op.width};
  Tensor output = torch::stable::new_empty(base_gate, {whole, 2});
  op.output = output.mutable_data_ptr();
  if (op.tokens > 0) run(op);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu::lora_glu_bwd(
    Tensor grad, Tensor base_gate, Tensor base_up, std::optional<Tensor> h_gate, std::optional<Tensor> h_up,
    std::optional<Tensor> lora_B_gate, std::optional<Tensor> lora_B_up, double scaling_gate,
    double scaling_up, std::optional<Tensor> gain_gate, std::optional<Tensor> gain_up,
    std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up, int64_t activation, bool need_output,
    bool need_gain_gate, bool need_gain_up, bool need_bias_gate, bool need_bias_up, bool joined) {
  check_matrix(base_gate, "base_gate");
  check_same(grad, "grad", base_gate, "base_gate");
  check_contiguous(grad, "grad");
  Given gate{"gate", base_gate, h_gate, lora_B_gate, scaling_gate, gain_gate, bias_gate};
  Given up{"up", base_up, h_up, lora_B_up, scaling_up, gain_up, bias_up};
  Glu op = glu_of(gate, up, activation);
  const int64_t T = op.tokens, N = op.width, none[] = {0}, columns[] = {N};
  const int64_t whole[] = {T, N}, beside[] = {T, 2 * N}, apart[] = {2, T, N};
  const ScalarType sums = op.wide ? ScalarType::Double : ScalarType::Float;
  Tensor grad_bases =
      joined ? torch::stable::new_empty(grad, {beside, 2}) : torch::stable::new_empty(grad, {apart, 3});
  Tensor output =
      need_output ? torch::stable::new_empty(grad, {whole, 2}) : torch::stable::new_empty(grad, {none, 1});
  const auto vector = [&](bool need) {
    return torch::stable::new_empty(grad, {need ? columns : none, 1}, sums);
  };
  Tensor grad_gain[2] = {vector(need_gain_gate), vector(need_gain_up)};
  Tensor grad_bias[2] = {vector(need_bias_gate), vector(need_bias_up)};
  const bool needs[2][2] = {{need_gain_gate, need_bias_gate}, {need_gain_up, need_bias_up}};
  const int64_t size = grad.element_size();
  for (int i = 0; i < 2; ++i) {
    Side& side = op.sides[i];
    side.grad = static_cast<char*>(grad_bases.mutable_data_ptr()) + i * size * (joined ? N : T * N);
    side.ld_grad = joined ? 2 * N : N;
    side.grad_gain = needs[i][0] ? grad_gain[i].mutable_data_ptr() : nullptr;
    side.grad_bias = needs[i][1] ? grad_bias[i].mutable_data_ptr() : nullptr;
  }
  op.output = need_output ? output.mutable_data_ptr() : nullptr;
  op.grad = grad.const_data_ptr();
  run(op);
  return {grad_bases, output, grad_gain[0], grad_gain[1], grad_bias[0], grad_bias[1]};
}

}  // namespace lora_fast
