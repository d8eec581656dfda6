// scaled = gain ⊙ grad_y, dgain = Σ_t grad_y ⊙ product, dbias = Σ_t grad_y, in one pass; of rows of many
// adapters with the gain of each row's, and dgain over its rows. The threads split the columns, so that the
// sums do not depend on how many there are.
#include "adapted_weight.h"
#include "grouped.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"
#include "token_sums.h"

namespace lora_fast {
namespace {

// Columns that one pass down the tokens takes.
constexpr int64_t kPass = 512;

struct GainGrad {
  const void* grad;     // [tokens, width], rows adjacent
  const void* product;  // the same, or null
  void* scaled;         // the same, or null
  ScalarType dtype;
  int64_t tokens, width;
  const void* gain;         // [width] of the dtype of the sums, or [adapters, width]
  void* grad_gain;          // the same, or null
  void* grad_bias;          // [width] or null
  const RowGroups* groups;  // null: all rows are of one adapter

  int64_t row(int64_t t) const { return groups != nullptr ? groups->order()[t] : t; }
};

template <class F, class T>
LORA_FAST_INLINE void group_strip(const GainGrad& op, int64_t t, int64_t rows, int64_t j, int64_t n,
                                  const F* gains, F* gain_sum, F* bias_sum) {
  Strip<F> gain{splat(F{1}), splat(F{1})}, gain_part{}, bias_part{};
  if (gains != nullptr) gain = load_packed(gains);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = op.row(t + r) * op.width + j;
    const Strip<F> g = load_strip_n<F>(static_cast<const T*>(op.grad) + at, n);
    if (op.scaled != nullptr)
      store_strip_n<F>(static_cast<T*>(op.scaled) + at, {g.even * gain.even, g.odd * gain.odd}, n);
    if (op.product != nullptr) {
      const Strip<F> v = load_strip_n<F>(static_cast<const T*>(op.product) + at, n);
      gain_part.even += g.even * v.even;
      gain_part.odd += g.odd * v.odd;
    }
    bias_part.even += g.even;
    bias_part.odd += g.odd;
  }
  const Strip<F> gain_old = load_packed(gain_sum), bias_old = load_packed(bias_sum);
  store_packed<F>(gain_sum, {gain_old.even + gain_part.even, gain_old.odd + gain_part.odd});
  store_packed<F>(bias_sum, {bias_old.even + bias_part.even, bias_old.odd + bias_part.odd});
}

// Rows [begin, end) of one adapter, or of none, of whose sums of four rows `done` went before.
template <class F, class T>
LORA_FAST_INLINE void rows_of(const GainGrad& op, int64_t begin, int64_t end, int64_t j0, int64_t cols,
                              const F* gains, Sums<F, kPass>& gain, Sums<F, kPass>& bias, int64_t& done) {
  int64_t own = 0;
  for (int64_t t = begin; t < end; t += kGroup) {
    const int64_t rows = std::min(kGroup, end - t);
    for (int64_t k = 0; k < cols; k += kStrip)
      group_strip<F, T>(op, t, rows, j0 + k, cols - k, gains != nullptr ? gains + k : nullptr,
                        gain.level[0] + k, bias.level[0] + k);
    gain.carry(++own, cols);
    bias.carry(++done, cols);
  }
}

template <class F, class T>
LORA_FAST_INLINE void gain_grad_of(const GainGrad& op, int64_t begin, int64_t end) {
  alignas(64) F gains[kPass];
  const int64_t adapters = op.groups != nullptr ? op.groups->adapters() : 1;
  for (int64_t j0 = begin; j0 < end; j0 += kPass) {
    const int64_t cols = std::min(kPass, end - j0);
    Sums<F, kPass> bias;
    int64_t done = 0;
    for (int64_t a = op.groups != nullptr ? -1 : 0; a < adapters; ++a) {
      const int64_t from = op.groups != nullptr ? op.groups->begin(a) : 0;
      const int64_t to = op.groups != nullptr ? op.groups->end(a) : op.tokens;
      const bool scales = op.scaled != nullptr && a >= 0 && from < to;
      if (scales) {
        std::copy_n(static_cast<const F*>(op.gain) + a * op.width + j0, cols, gains);
        std::fill(gains + cols, gains + round_up(cols, kStrip), F{});
        if (kDealt<T>) deal(gains, round_up(cols, kStrip));
      }
      Sums<F, kPass> gain;
      rows_of<F, T>(op, from, to, j0, cols, scales ? gains : nullptr, gain, bias, done);
      if (op.grad_gain != nullptr && a >= 0)
        write_sums(static_cast<F*>(op.grad_gain) + a * op.width, gain.total(cols), j0, cols, kDealt<T>);
    }
    write_sums(op.grad_bias, bias.total(cols), j0, cols, kDealt<T>);
  }
}

template <class F>
LORA_FAST_CLONES void gain_grad(const GainGrad& op, int64_t begin, int64_t end){
    LORA_FAST_BY_DTYPE(op.dtype, T, gain_grad_of<F, T>(op, begin, end))}

// gain: [width], or [adapters, width] with groups, of the dtype of the sums
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& grad_y, const std::optional<Tensor>& product,
                                       const std::optional<Tensor>& gain, const RowGroups* groups,
                                       bool need_scaled, bool need_gain, bool need_bias) {
  const int64_t tokens = grad_y.size(0), width = grad_y.size(1);
  STD_TORCH_CHECK(!need_gain || product, "product must be given where need_gain is true");
  if (product) check_same(*product, "product", grad_y, "grad_y");
  const bool wide = is_double(grad_y) || (gain && is_double(*gain));
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t none[] = {0}, columns[] = {width}, whole[] = {tokens, width};
  const int64_t each[] = {groups != nullptr ? groups->adapters() : 1, width};
  const bool scale = need_scaled && gain;
  Tensor scaled =
      scale ? torch::stable::new_empty(grad_y, {whole, 2}) : torch::stable::new_empty(grad_y, {none, 1});
  Tensor grad_gain = need_gain && groups != nullptr
                         ? torch::stable::new_empty(grad_y, {each, 2}, sum_dtype)
                         : torch::stable::new_empty(grad_y, {need_gain ? columns : none, 1}, sum_dtype);
  Tensor grad_bias = torch::stable::new_empty(grad_y, {need_bias ? columns : none, 1}, sum_dtype);
  if (!scale && !need_gain && !need_bias) return {scaled, grad_gain, grad_bias};
  const Tensor grad = torch::stable::contiguous(grad_y);
  const Tensor v = need_gain ? torch::stable::contiguous(*product) : grad;
  std::optional<Tensor> gains;
  if (scale) gains = torch::stable::contiguous(torch::stable::to(*gain, sum_dtype));
  const GainGrad op{grad.const_data_ptr(),
                    need_gain ? v.const_data_ptr() : nullptr,
                    scale ? scaled.mutable_data_ptr() : nullptr,
                    grad.scalar_type(),
                    tokens,
                    width,
                    gains ? gains->const_data_ptr() : nullptr,
                    need_gain ? grad_gain.mutable_data_ptr() : nullptr,
                    need_bias ? grad_bias.mutable_data_ptr() : nullptr,
                    groups};
  const int64_t blocks = round_up(width, kStrip) / kStrip;
  const int64_t grain = std::max<int64_t>(1, 32768 / (kStrip * std::max<int64_t>(1, tokens)));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    (wide ? gain_grad<double> : gain_grad<float>)(op, begin * kStrip, std::min(width, end * kStrip));
  });
  return {scaled, grad_gain, grad_bias};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cpu::lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                      std::optional<Tensor> gain, bool need_scaled,
                                                      bool need_gain, bool need_bias) {
  check_matrix(grad_y, "grad_y");
  if (gain) check_wide(*gain, "gain", grad_y.size(1));
  return run(grad_y, product, gain, nullptr, need_scaled, need_gain, need_bias);
}

std::tuple<Tensor, Tensor, Tensor> cpu::grouped_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                         std::optional<Tensor> gain, Tensor order,
                                                         Tensor starts, bool need_scaled, bool need_gain,
                                                         bool need_bias) {
  check_matrix(grad_y, "grad_y");
  const RowGroups groups(order, starts, grad_y.size(0));
  if (gain) {
    check_matrix(*gain, "gain");
    check_size(*gain, "gain", 0, groups.adapters());
    check_size(*gain, "gain", 1, grad_y.size(1));
  }
  return run(grad_y, product, gain, &groups, need_scaled, need_gain, need_bias);
}

}  // namespace lora_fast
