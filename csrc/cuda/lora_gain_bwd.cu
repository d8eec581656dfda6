#include <lora_fast/lora_gain_bwd.cuh>

#include "ops.h"
#include "passes.h"
#include "products.h"

namespace lora_fast {
namespace cuda {
namespace {

constexpr auto kName = "lora_gain_bwd";

template <class T>
void enqueue(const GainBackward& call, GainGradients& gradients, const std::optional<Tensor>& rank_sums) {
  const int64_t tokens = call.grad_y.size(0), width = call.grad_y.size(1);
  const bool scales = gradients.v.numel() > 0, sums = call.need_gain || call.need_bias;
  GainGrad<T> op{};
  op.grad = static_cast<const T*>(call.grad_y.const_data_ptr());
  op.product = call.need_gain ? static_cast<const T*>(call.product->const_data_ptr()) : nullptr;
  op.gain = call.gain;
  op.scaled = scales ? data_of<T>(gradients.v) : nullptr;
  op.stride_scaled = scales ? gradients.v.stride(0) : 0;
  op.tokens = tokens;
  op.width = width;
  op.scaling = static_cast<float>(call.scaling);
  op.grad_gain = call.need_gain ? data_of<float>(gradients.gain) : nullptr;
  op.grad_bias = call.need_bias ? data_of<float>(gradients.bias) : nullptr;
  int64_t splits = 0;
  const OnDevice device(call.grad_y, kName);
  std::optional<Tensor> partial;
  if (scales || sums) {
    check_launch(plan_lora_gain_bwd(&op, &splits), kName);
    if (sums) {
      partial = empty(call.grad_y, {splits * 2 * width}, ScalarType::Float);
      op.partial = data_of<float>(*partial);
    }
    check_launch(lora_gain_bwd(op, splits, device.stream()), kName);
  }
  if (rank_sums) {
    Tensor product = *rank_sums;
    multiply(transposed(call.grad_y), *call.h, product);
    op.rank_sums = data_of<float>(product);
    op.lora_B = call.lora_B->const_data_ptr();
    op.factor_dtype = dtype_of(*call.lora_B, "lora_B");
    op.rank = call.lora_B->size(1);
    op.from_base = call.from_base && call.need_gain;
    op.grad_B = call.need_B ? gradients.B.mutable_data_ptr() : nullptr;
  }
  if (sums || rank_sums) check_launch(finish_lora_gain_bwd(op, splits, device.stream()), kName);
}

}  // namespace

GainGradients gain_bwd(const GainBackward& call) {
  const int64_t tokens = call.grad_y.size(0), width = call.grad_y.size(1);
  const bool ranks = call.need_B || (call.need_gain && call.from_base);
  const auto vector = [&](bool needed) {
    return empty(call.grad_y, {needed ? width : 0}, ScalarType::Float);
  };
  const bool makes_v = call.need_v && call.gain.factor != nullptr;
  GainGradients gradients{
      !makes_v ? empty(call.grad_y, {0})
      : call.v ? *call.v
               : empty(call.grad_y, {tokens, width}),
      vector(call.need_gain), vector(call.need_bias),
      call.need_B ? empty(*call.lora_B, {width, call.lora_B->size(1)}) : empty(call.grad_y, {0})};
  if (width == 0) return gradients;
  const std::optional<Tensor> rank_sums =
      ranks ? std::optional(empty(call.grad_y, {width, call.lora_B->size(1)}, ScalarType::Float))
            : std::nullopt;
  by_dtype(dtype_of(call.grad_y, "grad_y"),
           [&](auto type) { enqueue<typename decltype(type)::type>(call, gradients, rank_sums); });
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                 std::optional<Tensor> gain, bool need_scaled, bool need_gain,
                                                 bool need_bias) {
  const Operand whole = operand(grad_y, "grad_y", grad_y);
  STD_TORCH_CHECK(!need_gain || product, "product must be given where need_gain is true");
  if (product) {
    STD_TORCH_CHECK(operand(*product, "product", grad_y).dtype == whole.dtype,
                    "product must have the dtype of grad_y");
    check_shape(*product, "product", whole.rows, whole.cols);
  }
  const Gain gain_{gain ? float_data(*gain, "gain", whole.cols, grad_y) : nullptr, nullptr};
  GainBackward call{as_contiguous(grad_y), std::nullopt, gain_,     std::nullopt, std::nullopt, 1, false,
                    need_scaled,           need_gain,    need_bias, false};
  if (need_gain) call.product = as_contiguous(*product);
  const GainGradients gradients = gain_bwd(call);
  return {gradients.v, gradients.gain, gradients.bias};
}

}  // namespace cuda
}  // namespace lora_fast
