// The passes over activations as C++ calls them, their arguments checked; operators are made of them.
#pragma once

#include <lora_fast/gain.cuh>
#include <optional>

#include "binding.h"

namespace lora_fast::cuda {

// out = gain ⊙ (base + s h lora_Bᵀ) + bias, and product, where it is given, what the gain multiplies.
void compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, double scaling, const Gain& gain,
             const std::optional<Tensor>& bias, Tensor& out, std::optional<Tensor>& product);

// What backward makes of dy beside the products with W and x (lora_gain_bwd.cuh).
struct GainBackward {
  Tensor grad_y;                  // contiguous
  std::optional<Tensor> product;  // v, or base with from_base
  Gain gain;
  std::optional<Tensor> h, lora_B;  // contiguous, where need_B or from_base
  double scaling;
  bool from_base, need_v, need_gain, need_bias, need_B;
  std::optional<Tensor> v = std::nullopt;  // [T, N], which takes dv where there is a gain; else it is made
};

// Empty where it is not asked for, and v where there is no gain: it is grad_y then.
struct GainGradients {
  Tensor v, gain, bias, B;
};

GainGradients gain_bwd(const GainBackward& call);

}  // namespace lora_fast::cuda
