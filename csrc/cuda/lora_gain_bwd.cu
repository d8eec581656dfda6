#include <lora_fast/lora_gain_bwd.cuh>

#include "binding.h"
#include "ops.h"

namespace lora_fast {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor> lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                 std::optional<Tensor> gain, bool need_scaled, bool need_gain,
                                                 bool need_bias) {
  constexpr auto kName = "lora_gain_bwd";
  const Operand whole = operand(grad_y, "grad_y", grad_y);
  const int64_t tokens = whole.rows, width = whole.cols;
  STD_TORCH_CHECK(!need_gain || product, "product must be given where need_gain is true");
  if (product) {
    STD_TORCH_CHECK(operand(*product, "product", grad_y).dtype == whole.dtype,
                    "product must have the dtype of grad_y");
    check_shape(*product, "product", tokens, width);
  }
  const float* gain_ = gain ? float_data(*gain, "gain", width, grad_y) : nullptr;
  const bool scale = need_scaled && gain;
  Tensor scaled = scale ? empty(grad_y, {tokens, width}) : empty(grad_y, {0});
  Tensor grad_gain = empty(grad_y, {need_gain ? width : 0}, ScalarType::Float);
  Tensor grad_bias = empty(grad_y, {need_bias ? width : 0}, ScalarType::Float);
  if (width == 0 || (!scale && !need_gain && !need_bias)) return {scaled, grad_gain, grad_bias};
  const Tensor grad = torch::stable::contiguous(grad_y);
  const std::optional<Tensor> v =
      need_gain ? std::optional(torch::stable::contiguous(*product)) : std::nullopt;
  const OnDevice device(grad_y, kName);
  by_dtype(whole.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    GainGrad<T> op{static_cast<const T*>(grad.const_data_ptr()),
                   v ? static_cast<const T*>(v->const_data_ptr()) : nullptr,
                   gain_,
                   scale ? data_of<T>(scaled) : nullptr,
                   tokens,
                   width,
                   0,
                   nullptr,
                   need_gain ? data_of<float>(grad_gain) : nullptr,
                   need_bias ? data_of<float>(grad_bias) : nullptr};
    int64_t splits = 0;
    check_launch(plan_lora_gain_bwd(&op, &splits), kName);
    std::optional<Tensor> partial;
    if (need_gain || need_bias) {
      partial = empty(grad_gain, {splits * 2 * width});
      op.partial = data_of<float>(*partial);
    }
    check_launch(lora_gain_bwd(op, splits, device.stream()), kName);
  });
  return {scaled, grad_gain, grad_bias};
}

}  // namespace cuda
}  // namespace lora_fast
