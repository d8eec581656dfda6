#include "linear.h"
#include "ops.h"
#include "passes.h"
#include "products.h"

namespace lora_fast {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                      Tensor lora_A, Tensor lora_B, double scaling,
                                                      std::optional<Tensor> gain,
                                                      std::optional<Tensor> magnitude, bool keep_base,
                                                      std::optional<Tensor> kept_norm,
                                                      std::optional<Tensor> kept_key, int64_t version) {
  const GivenGain given{gain, magnitude};
  check_linear_fwd(x, weight, bias, lora_A, lora_B, given, keep_base);
  const int64_t tokens = x.size(0), N = weight.size(0);
  const Tensor norm = norm_of(weight, lora_A, lora_B, scaling, given, kept_norm, kept_key, version);
  const Factors factors = factors_of(lora_A, lora_B, x, true);
  Tensor h = empty(x, {tokens, lora_A.size(0)}), y = empty(x, {tokens, N});
  Tensor base = keep_base ? empty(x, {tokens, N}) : empty(x, {0});
  std::optional<Tensor> no_product;
  multiply(x, transposed(factors.A), h);
  if (!given.given()) {
    // as nn.Linear calls it, so that lora_B = 0 gives its output to the bit
    if (bias)
      multiply_add(*bias, 1, x, transposed(weight), 1, y);
    else
      multiply(x, transposed(weight), y);
    compose(y, h, factors.B, scaling, Gain{}, std::nullopt, y, no_product);
    return {y, base, h, norm};
  }
  Tensor& product = keep_base ? base : y;
  multiply(x, transposed(weight), product);
  compose(product, h, factors.B, scaling, given.over(norm), bias, y, no_product);
  return {y, base, h, norm};
}

}  // namespace cuda
}  // namespace lora_fast
