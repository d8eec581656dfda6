// What the operators of a whole linear share: their arguments, checked before anything is made or changed.
#pragma once

#include <lora_fast/gain.cuh>
#include <optional>

#include "binding.h"
#include "ops.h"

namespace lora_fast::cuda {

// The gain's two forms in an operator's arguments: gain itself, or magnitude, to be divided by the norm.
struct GivenGain {
  std::optional<Tensor> gain, magnitude;

  bool given() const { return gain || magnitude; }
  void check(int64_t size, const Tensor& like) const {
    STD_TORCH_CHECK(!(gain && magnitude), "gain and magnitude must not both be given");
    if (gain) float_data(*gain, "gain", size, like);
    if (magnitude) float_data(*magnitude, "magnitude", size, like);
  }
  Gain over(const std::optional<Tensor>& norm) const {
    const auto data = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
    if (magnitude) return {data(*magnitude), data(*norm)};
    return {gain ? data(*gain) : nullptr, nullptr};
  }
};

// lora_A [R, K] and lora_B [N, R], contiguous, in the dtype of the products.
struct Factors {
  Tensor A, B;
};

// In one launch where they are float32 beside 16 bits. need_A: whether the call multiplies with lora_A.
Factors factors_of(const Tensor& lora_A, const Tensor& lora_B, const Tensor& like, bool need_A);

// weight [N, K], lora_A [R, K], lora_B [N, R]; weight has the dtype of `like`, a factor that or float32.
inline void check_linear(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& like,
                         const char* like_name) {
  check_adapter(weight, lora_A, lora_B);
  const Dtype dtype = dtype_of(like, like_name);
  STD_TORCH_CHECK(operand(weight, "weight", like).dtype == dtype, "weight must have the dtype of ",
                  like_name);
  for (const auto& [tensor, name] : {std::pair(&lora_A, "lora_A"), {&lora_B, "lora_B"}}) {
    const Dtype factor = operand(*tensor, name, like).dtype;
    STD_TORCH_CHECK(factor == dtype || factor == Dtype::f32, name, " must be float32 or have the dtype of ",
                    like_name);
  }
  STD_TORCH_CHECK(like.size(0) >= 1 && weight.numel() > 0 && lora_A.size(0) >= 1, like_name,
                  ", weight and lora_A must not be empty");
}

// Of a forward: x [T, K], bias [N].
inline void check_linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& lora_A, const Tensor& lora_B, const GivenGain& gain,
                             bool keep_base) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  check_linear(weight, lora_A, lora_B, x, "x");
  check_shape(x, "x", x.size(0), weight.size(1));
  gain.check(weight.size(0), x);
  STD_TORCH_CHECK(gain.given() || !keep_base, "keep_base must be false where there is no gain");
  if (!bias) return;
  vector_data(*bias, "bias", weight.size(0), x);
  STD_TORCH_CHECK(gain.given() || bias->scalar_type() == x.scalar_type(),
                  "bias must have the dtype of x where there is no gain");
}

// The norm of the rows where there is a magnitude, from kept_norm where kept_key says that it holds; else
// empty.
inline Tensor norm_of(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                      const GivenGain& gain, const std::optional<Tensor>& kept_norm,
                      const std::optional<Tensor>& kept_key, int64_t version) {
  STD_TORCH_CHECK(kept_norm.has_value() == kept_key.has_value(), "kept_norm and kept_key must come together");
  if (!gain.magnitude) return empty(weight, {0}, ScalarType::Float);
  if (!kept_norm) return weight_norm_fwd(weight, lora_A, lora_B, scaling, true);
  return weight_norm_kept(weight, lora_A, lora_B, scaling, true, *kept_norm, *kept_key, version);
}

}  // namespace lora_fast::cuda
