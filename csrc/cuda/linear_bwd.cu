#include "linear.h"
#include "ops.h"
#include "passes.h"
#include "products.h"

namespace lora_fast {
namespace cuda {
namespace {

// x, product and h where a gradient reads them.
void check_kept(const GainBackward& call, const std::optional<Tensor>& x, const Tensor& lora_A, bool need_A) {
  const int64_t tokens = call.grad_y.size(0), R = lora_A.size(0);
  const auto check = [&](const std::optional<Tensor>& tensor, const char* name, int64_t cols) {
    STD_TORCH_CHECK(tensor.has_value(), name, " must be given for the gradients that are asked for");
    check_shape(*tensor, name, tokens, cols);
    check_device(*tensor, name, call.grad_y);
    STD_TORCH_CHECK(tensor->scalar_type() == call.grad_y.scalar_type(), name,
                    " must have the dtype of grad_y");
  };
  STD_TORCH_CHECK(!call.need_gain || call.gain.factor != nullptr,
                  "gain or magnitude must be given where need_gain is true");
  if (need_A) check(x, "x", lora_A.size(1));
  if (call.need_gain) check(call.product, "product", call.grad_y.size(1));
  if (call.need_B || (call.need_gain && call.from_base)) check(call.h, "h", R);
}

// W, lora_A below it in W's dtype, and rows of zeros to a multiple: [N + P, K].
void check_stacked(const Tensor& stacked, const GivenGain& gain, const Tensor& weight, int64_t rank,
                   const Tensor& grad_y) {
  STD_TORCH_CHECK(gain.given(), "stacked must come with gain or magnitude: else dv is grad_y itself");
  const int64_t least = weight.size(0) + rank;
  STD_TORCH_CHECK(stacked.dim() == 2 && stacked.size(0) >= least && stacked.size(1) == weight.size(1),
                  "stacked must be [", least, " or more, ", weight.size(1), "]");
  check_device(stacked, "stacked", grad_y);
  STD_TORCH_CHECK(stacked.scalar_type() == grad_y.scalar_type(), "stacked must have the dtype of grad_y");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> magnitude, std::optional<Tensor> norm,
    std::optional<Tensor> product, std::optional<Tensor> h, bool from_base, bool need_x, bool need_A,
    bool need_B, bool need_gain, bool need_bias, std::optional<Tensor> stacked) {
  STD_TORCH_CHECK(grad_y.dim() == 2, "grad_y must have 2 dimensions, got ", grad_y.dim());
  check_linear(weight, lora_A, lora_B, grad_y, "grad_y");
  const int64_t tokens = grad_y.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  check_shape(grad_y, "grad_y", tokens, N);
  const GivenGain given{gain, magnitude};
  given.check(N, grad_y);
  STD_TORCH_CHECK(!magnitude || norm, "norm must be given beside magnitude");
  if (norm) float_data(*norm, "norm", N, grad_y);
  GainBackward call{
      as_contiguous(grad_y), product,   given.over(norm), h,     as_contiguous(lora_B), scaling, from_base,
      need_x || need_A,      need_gain, need_bias,        need_B};
  check_kept(call, x, lora_A, need_A);
  if (need_gain) call.product = as_contiguous(*product);
  if (stacked) check_stacked(*stacked, given, weight, R, grad_y);

  // with `stacked`, dv and dh lie side by side, and dx is one product with both
  const int64_t width = stacked ? stacked->size(0) : N + R;
  std::optional<Tensor> both;
  if (stacked && need_x) {
    both = empty(grad_y, {tokens, width});
    call.v = view(*both, 0, tokens, N, width, 1);
  }
  const GainGradients of_y = gain_bwd(call);
  const Tensor& grad_v = given.given() ? of_y.v : call.grad_y;
  Tensor grad_A = need_A ? empty(lora_A, {R, K}) : empty(lora_A, {0});
  Tensor grad_x = need_x ? empty(grad_y, {tokens, K}) : empty(grad_y, {0});
  if (need_x || need_A) {
    const Factors factors = factors_of(lora_A, lora_B, grad_y, need_x && !both);
    Tensor grad_h = both ? view(*both, N, tokens, R, width, 1) : empty(grad_y, {tokens, R});
    multiply_add(grad_h, 0, grad_v, factors.B, scaling, grad_h);
    if (need_A) multiply(transposed(grad_h), *x, grad_A);
    if (both) {
      Tensor rest = view(*both, N + R, tokens, width - N - R, width, 1);
      if (rest.size(1) > 0) torch::stable::zero_(rest);
      multiply(*both, *stacked, grad_x);
    } else if (need_x) {
      std::optional<Tensor> no_product;
      multiply(grad_v, weight, grad_x);
      compose(grad_x, grad_h, transposed(factors.A), 1, Gain{}, std::nullopt, grad_x, no_product);
    }
  }
  return {grad_x, grad_A, of_y.B, of_y.gain, of_y.bias};
}

}  // namespace cuda
}  // namespace lora_fast
