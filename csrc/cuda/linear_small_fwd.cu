#include <lora_fast/lora_linear_small_fwd.cuh>

#include "linear.h"
#include "ops.h"

namespace lora_fast {
namespace cuda {
namespace {

constexpr int64_t kMostRank = 1024;  // which the tests reach

// What the two launches for few tokens take.
void check_small(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                 const GivenGain& gain) {
  const int64_t tokens = x.size(0), K = weight.size(1), R = lora_A.size(0);
  STD_TORCH_CHECK(gain.given(), "gain or magnitude must be given");
  STD_TORCH_CHECK(tokens <= kSmallTokens, "x must have 1 to ", kSmallTokens, " rows, got ", tokens);
  STD_TORCH_CHECK(K % 8 == 0 && R <= kMostRank, "K must be a multiple of 8 and the rank at most ", kMostRank,
                  ", got ", K, " and ", R);
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float, "x must be bfloat16 or float16");
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), "lora_A and lora_B must have one dtype");
  STD_TORCH_CHECK(weight.stride(1) == 1 && weight.stride(0) % 8 == 0,
                  "weight must have adjacent columns in aligned rows");
  for (const auto& [tensor, name] :
       {std::pair(&x, "x"), {&weight, "weight"}, {&lora_A, "lora_A"}, {&lora_B, "lora_B"}})
    STD_TORCH_CHECK(is_aligned(tensor->const_data_ptr()), name, " must start at a multiple of 16 bytes");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_small_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> magnitude, bool keep_base,
    std::optional<Tensor> kept_norm, std::optional<Tensor> kept_key, int64_t version) {
  constexpr auto kName = "linear_small_fwd";
  const GivenGain given{gain, magnitude};
  check_linear_fwd(x, weight, bias, lora_A, lora_B, given, keep_base);
  x = as_contiguous(x);
  lora_A = as_contiguous(lora_A);
  lora_B = as_contiguous(lora_B);
  check_small(x, weight, lora_A, lora_B, given);
  const int64_t tokens = x.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  const Tensor norm = norm_of(weight, lora_A, lora_B, scaling, given, kept_norm, kept_key, version);
  Tensor y = empty(x, {tokens, N}), h = empty(x, {tokens, R});
  Tensor base = keep_base ? empty(x, {tokens, N}) : empty(x, {0});
  const int64_t splits = small_splits(K, R);
  Tensor partial = empty(x, {splits * tokens * padded_rank(R)}, ScalarType::Float);
  const OnDevice device(x, kName);
  const auto run = [&](auto type, auto factors) {
    using T = typename decltype(type)::type;
    using F = typename decltype(factors)::type;
    const SmallProject<T> project{static_cast<const T*>(x.const_data_ptr()),
                                  lora_A.const_data_ptr(),
                                  static_cast<int>(tokens),
                                  K,
                                  R,
                                  data_of<float>(partial)};
    const SmallLinear<T> linear{static_cast<const T*>(x.const_data_ptr()),
                                static_cast<const T*>(weight.const_data_ptr()),
                                weight.stride(0),
                                lora_B.const_data_ptr(),
                                data_of<float>(partial),
                                given.over(norm),
                                bias ? bias->const_data_ptr() : nullptr,
                                bias ? dtype_of(*bias, "bias") : Dtype::f32,
                                static_cast<float>(scaling),
                                static_cast<int>(tokens),
                                static_cast<int>(splits),
                                N,
                                K,
                                R,
                                data_of<T>(y),
                                keep_base ? data_of<T>(base) : nullptr,
                                data_of<T>(h)};
    check_launch(lora_linear_small_fwd<T, F>(project, linear, device.stream()), kName);
  };
  by_dtype(dtype_of(x, "x"), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (lora_A.scalar_type() == x.scalar_type()) return run(type, type);
      run(type, Type<float>());
    }
  });
  return {y, base, h, norm};
}

}  // namespace cuda
}  // namespace lora_fast
