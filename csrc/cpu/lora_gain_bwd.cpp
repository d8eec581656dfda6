// scaled = gain ⊙ grad_y, dgain = Σ_t grad_y ⊙ product, dbias = Σ_t grad_y, in one pass. The threads split
// the columns, so that the sums do not depend on how many there are.
#include "adapted_weight.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// Columns that one pass down the tokens takes; rows whose sum is made in registers.
constexpr int64_t kPass = 512;
constexpr int64_t kGroup = 4;
// Sums over tokens in levels, so that their error does not grow with the number of tokens: a level holds the
// sum of up to kFan sums of the level below it, the last of any number.
constexpr int64_t kLevels = 4;
constexpr int64_t kFan = 16;

template <class F>
struct Sums {
  alignas(64) F level[kLevels][kPass] = {};

  // After `groups` groups, each level that is full goes into the one above.
  LORA_FAST_INLINE void carry(int64_t groups, int64_t cols) {
    for (int64_t l = 0; l + 1 < kLevels && groups % kFan == 0; ++l, groups /= kFan) empty(l, cols);
  }

  LORA_FAST_INLINE const F* total(int64_t cols) {
    for (int64_t l = 0; l + 1 < kLevels; ++l) empty(l, cols);
    return level[kLevels - 1];
  }

 private:
  LORA_FAST_INLINE void empty(int64_t l, int64_t cols) {
    for (int64_t j = 0; j < round_up(cols, kStrip); ++j) level[l + 1][j] += level[l][j];
    std::fill_n(level[l], round_up(cols, kStrip), F{});
  }
};

struct GainGrad {
  const void* grad;     // [tokens, width], rows adjacent
  const void* product;  // the same, or null
  void* scaled;         // the same, or null
  ScalarType dtype;
  int64_t tokens, width;
  const void* gain;  // packed
  void* grad_gain;   // [width] or null
  void* grad_bias;
};

template <class F, class T>
LORA_FAST_INLINE void group_strip(const GainGrad& op, int64_t t, int64_t rows, int64_t j, int64_t n,
                                  F* gain_sum, F* bias_sum) {
  Strip<F> gain{}, gain_part{}, bias_part{};
  if (op.scaled != nullptr) gain = load_packed(static_cast<const F*>(op.gain) + j);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (t + r) * op.width + j;
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

template <class F>
LORA_FAST_INLINE void write_sums(void* out, const F* sums, int64_t j0, int64_t cols, bool dealt) {
  if (out == nullptr) return;
  for (int64_t j = 0; j < cols; ++j) static_cast<F*>(out)[j0 + j] = sums[dealt ? dealt_position(j) : j];
}

template <class F, class T>
LORA_FAST_INLINE void gain_grad_of(const GainGrad& op, int64_t begin, int64_t end) {
  for (int64_t j0 = begin; j0 < end; j0 += kPass) {
    const int64_t cols = std::min(kPass, end - j0);
    Sums<F> gain, bias;
    for (int64_t t = 0; t < op.tokens; t += kGroup) {
      const int64_t rows = std::min(kGroup, op.tokens - t);
      for (int64_t k = 0; k < cols; k += kStrip)
        group_strip<F, T>(op, t, rows, j0 + k, cols - k, gain.level[0] + k, bias.level[0] + k);
      gain.carry(t / kGroup + 1, cols);
      bias.carry(t / kGroup + 1, cols);
    }
    write_sums(op.grad_gain, gain.total(cols), j0, cols, kDealt<T>);
    write_sums(op.grad_bias, bias.total(cols), j0, cols, kDealt<T>);
  }
}

template <class F>
LORA_FAST_CLONES void gain_grad(const GainGrad& op, int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(op.dtype, T, gain_grad_of<F, T>(op, begin, end))
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cpu::lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                      std::optional<Tensor> gain, bool need_scaled,
                                                      bool need_gain, bool need_bias) {
  check_matrix(grad_y, "grad_y");
  const int64_t tokens = grad_y.size(0), width = grad_y.size(1);
  if (gain) check_wide(*gain, "gain", width);
  STD_TORCH_CHECK(!need_gain || product, "product must be given where need_gain is true");
  if (product) check_same(*product, "product", grad_y, "grad_y");
  const bool wide = is_double(grad_y) || (gain && is_double(*gain));
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t none[] = {0}, columns[] = {width}, whole[] = {tokens, width};
  const bool scale = need_scaled && gain;
  Tensor scaled =
      scale ? torch::stable::new_empty(grad_y, {whole, 2}) : torch::stable::new_empty(grad_y, {none, 1});
  Tensor grad_gain = torch::stable::new_empty(grad_y, {need_gain ? columns : none, 1}, sum_dtype);
  Tensor grad_bias = torch::stable::new_empty(grad_y, {need_bias ? columns : none, 1}, sum_dtype);
  if (!scale && !need_gain && !need_bias) return {scaled, grad_gain, grad_bias};
  const Tensor grad = torch::stable::contiguous(grad_y);
  const Tensor v = need_gain ? torch::stable::contiguous(*product) : grad;
  std::optional<PackedVector> packed_gain;
  if (scale) packed_gain.emplace(*gain, wide, is_dealt(grad.scalar_type()));
  const GainGrad op{grad.const_data_ptr(),
                    need_gain ? v.const_data_ptr() : nullptr,
                    scale ? scaled.mutable_data_ptr() : nullptr,
                    grad.scalar_type(),
                    tokens,
                    width,
                    packed_gain ? packed_gain->data() : nullptr,
                    need_gain ? grad_gain.mutable_data_ptr() : nullptr,
                    need_bias ? grad_bias.mutable_data_ptr() : nullptr};
  const int64_t blocks = round_up(width, kStrip) / kStrip;
  const int64_t grain = std::max<int64_t>(1, 32768 / (kStrip * std::max<int64_t>(1, tokens)));
  for_chunks(chunk_count(blocks, grain), blocks, [&](int64_t, int64_t begin, int64_t end) {
    (wide ? gain_grad<double> : gain_grad<float>)(op, begin * kStrip, std::min(width, end * kStrip));
  });
  return {scaled, grad_gain, grad_bias};
}

}  // namespace lora_fast
