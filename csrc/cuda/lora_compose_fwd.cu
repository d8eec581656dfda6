#include <lora_fast/lora_compose_fwd.cuh>

#include "binding.h"
#include "ops.h"
#include "passes.h"

namespace lora_fast {
namespace cuda {

void compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, double scaling, const Gain& gain,
             const std::optional<Tensor>& bias, Tensor& out, std::optional<Tensor>& product) {
  constexpr auto kName = "lora_compose_fwd";
  const Operand base_ = operand(base, "base", base), h_ = operand(h, "h", base),
                lora_B_ = operand(lora_B, "lora_B", base), out_ = operand(out, "out", base);
  check_shape(h, "h", base_.rows, lora_B_.cols);
  check_shape(lora_B, "lora_B", base_.cols, h_.cols);
  check_shape(out, "out", base_.rows, base_.cols);
  STD_TORCH_CHECK(out_.dtype == base_.dtype, "out must have the dtype of base");
  Operand kept{};
  if (product) {
    kept = operand(*product, "product", base);
    check_shape(*product, "product", base_.rows, base_.cols);
    STD_TORCH_CHECK(kept.dtype == base_.dtype, "product must have the dtype of base");
  }
  const void* bias_ = bias ? vector_data(*bias, "bias", base_.cols, base) : nullptr;
  const Dtype bias_dtype = bias ? dtype_of(*bias, "bias") : Dtype::f32;
  if (base.numel() == 0) return;
  const OnDevice device(base, kName);
  by_dtypes(base_.dtype, h_.dtype, lora_B_.dtype, [&](auto type, auto factors) {
    using T = typename decltype(type)::type;
    using E = typename decltype(factors)::type;
    check_launch(lora_compose_fwd<T, E>(base_, h_, lora_B_, static_cast<float>(scaling), gain, false, bias_,
                                        bias_dtype, out_, kept, device.stream()),
                 kName);
  });
}

void lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                      std::optional<Tensor> bias, Tensor out, std::optional<Tensor> product) {
  STD_TORCH_CHECK(base.dim() == 2, "base must have 2 dimensions, got ", base.dim());
  const Gain gain_{gain ? float_data(*gain, "gain", base.size(1), base) : nullptr, nullptr};
  compose(base, h, lora_B, scaling, gain_, bias, out, product);
}

// Composition with W for base, in place.
void merge_weight(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                  bool per_output) {
  constexpr auto kName = "merge_weight";
  check_adapter(weight, lora_A, lora_B);
  const Operand w = operand(weight, "weight", weight), a = operand(lora_A, "lora_A", weight),
                b = operand(lora_B, "lora_B", weight);
  const Gain gain_{gain ? float_data(*gain, "gain", per_output ? w.rows : w.cols, weight) : nullptr, nullptr};
  if (weight.numel() == 0) return;
  const bool transposed = is_transposed(w);
  const Operand base = transposed ? w.transposed() : w;
  const Operand p = transposed ? a.transposed() : b, q = transposed ? b : a.transposed();
  const OnDevice device(weight, kName);
  by_dtypes(w.dtype, a.dtype, b.dtype, [&](auto type, auto factors) {
    using T = typename decltype(type)::type;
    using E = typename decltype(factors)::type;
    check_launch(
        lora_compose_fwd<T, E>(base, p, q, static_cast<float>(scaling), gain_, per_output != transposed,
                               nullptr, Dtype::f32, base, Operand{}, device.stream()),
        kName);
  });
}

}  // namespace cuda
}  // namespace lora_fast
