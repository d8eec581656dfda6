#include <lora_fast/lora_linear_small_fwd.cuh>

#include "binding.h"
#include "ops.h"

namespace lora_fast {
namespace cuda {
namespace {

constexpr int64_t kMostRank = 1024;  // h lies in shared memory

}  // namespace

Tensor lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                             Tensor gain, std::optional<Tensor> bias, Tensor y,
                             std::optional<Tensor> product) {
  constexpr auto kName = "lora_linear_small_fwd";
  check_adapter(weight, lora_A, lora_B);
  const Operand x_ = operand(x, "x", x), w = operand(weight, "weight", x), a = operand(lora_A, "lora_A", x),
                b = operand(lora_B, "lora_B", x), y_ = operand(y, "y", x);
  const int64_t tokens = x_.rows, N = w.rows, K = w.cols, R = a.rows;
  check_shape(x, "x", tokens, K);
  check_shape(y, "y", tokens, N);
  STD_TORCH_CHECK(tokens >= 1 && tokens <= kSmallTokens, "x must have 1 to ", kSmallTokens, " rows, got ",
                  tokens);
  STD_TORCH_CHECK(K > 0 && K % 8 == 0 && R >= 1 && R <= kMostRank,
                  "K must be a positive multiple of 8 and the rank 1 to ", kMostRank, ", got ", K, " and ",
                  R);
  STD_TORCH_CHECK(x_.dtype != Dtype::f32 && w.dtype == x_.dtype && y_.dtype == x_.dtype,
                  "x, weight and y must have one dtype, bfloat16 or float16");
  STD_TORCH_CHECK(a.dtype == b.dtype && (a.dtype == x_.dtype || a.dtype == Dtype::f32),
                  "lora_A and lora_B must have one dtype, that of x or float32");
  for (const auto& [tensor, name] : {std::pair(&x, "x"), {&lora_A, "lora_A"}, {&lora_B, "lora_B"}, {&y, "y"}})
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(w.col_stride == 1 && w.row_stride % 8 == 0,
                  "weight must have adjacent columns in aligned rows");
  for (const auto& [data, name] :
       {std::pair(x_.data, "x"), {w.data, "weight"}, {a.data, "lora_A"}, {b.data, "lora_B"}})
    STD_TORCH_CHECK(is_aligned(data), name, " must start at a multiple of 16 bytes");
  if (product) {
    STD_TORCH_CHECK(operand(*product, "product", x).dtype == x_.dtype && product->is_contiguous(),
                    "product must be contiguous with the dtype of x");
    check_shape(*product, "product", tokens, N);
  }
  const float* gain_ = float_data(gain, "gain", N, x);
  const void* bias_ = bias ? vector_data(*bias, "bias", N, x) : nullptr;
  const Dtype bias_dtype = bias ? dtype_of(*bias, "bias") : Dtype::f32;

  Tensor h = empty(x, {tokens, R});
  const int64_t splits = small_splits(K, R);
  Tensor partial = empty(x, {splits * tokens * R}, ScalarType::Float);
  const OnDevice device(x, kName);
  const auto run = [&](auto type, auto factors) {
    using T = typename decltype(type)::type;
    using F = typename decltype(factors)::type;
    const SmallProject<T> project{static_cast<const T*>(x_.data), a.data, static_cast<int>(tokens), K, R,
                                  data_of<float>(partial)};
    const SmallLinear<T> linear{static_cast<const T*>(x_.data),
                                static_cast<const T*>(w.data),
                                w.row_stride,
                                b.data,
                                data_of<float>(partial),
                                gain_,
                                bias_,
                                bias_dtype,
                                static_cast<float>(scaling),
                                static_cast<int>(tokens),
                                static_cast<int>(splits),
                                N,
                                K,
                                R,
                                data_of<T>(y),
                                product ? data_of<T>(*product) : nullptr,
                                data_of<T>(h)};
    check_launch(lora_linear_small_fwd<T, F>(project, linear, device.stream()), kName);
  };
  by_dtype(x_.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (a.dtype == x_.dtype) return run(type, type);
      run(type, Type<float>());
    }
  });
  return h;
}

}  // namespace cuda
}  // namespace lora_fast
