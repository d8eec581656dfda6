#include <lora_fast/round_factors.cuh>

#include "linear.h"
#include "products.h"

namespace lora_fast {
namespace cuda {

Factors factors_of(const Tensor& lora_A, const Tensor& lora_B, const Tensor& like, bool need_A) {
  constexpr auto kName = "round_factors";
  Factors factors{as_contiguous(lora_A), as_contiguous(lora_B)};
  const int64_t R = lora_A.size(0), K = lora_A.size(1), N = lora_B.size(0);
  const bool rounds_A = need_A && lora_A.scalar_type() != like.scalar_type();
  const bool rounds_B = lora_B.scalar_type() != like.scalar_type();
  if (!rounds_A && !rounds_B) return factors;
  const int64_t of_A = rounds_A ? R * K : 0, of_B = rounds_B ? N * R : 0;
  const int64_t start_B = divide_up(of_A, 8) * 8;  // in whole vectors
  Tensor rounded = empty(like, {start_B + of_B});
  const OnDevice device(like, kName);
  by_dtype(dtype_of(like, "x"), [&](auto type) {
    using T = typename decltype(type)::type;
    const RoundFactors<T> op{factors.A.const_data_ptr(),
                             factors.B.const_data_ptr(),
                             dtype_of(lora_A, "lora_A"),
                             dtype_of(lora_B, "lora_B"),
                             of_A,
                             of_B,
                             data_of<T>(rounded),
                             data_of<T>(rounded) + start_B};
    check_launch(round_factors(op, device.stream()), kName);
  });
  if (rounds_A) factors.A = view(rounded, 0, R, K, K, 1);
  if (rounds_B) factors.B = view(rounded, start_B, N, R, R, 1);
  return factors;
}

}  // namespace cuda
}  // namespace lora_fast
