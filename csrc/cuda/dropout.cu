#include <lora_fast/dropout.cuh>

#include "binding.h"
#include "ops.h"

namespace lora_fast {
namespace cuda {

Tensor dropout(Tensor x, Tensor seed, double p) {
  constexpr auto kName = "dropout";
  const Operand whole = operand(x, "x", x);
  check_device(seed, "seed", x);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must be in [0, 1], got ", p);
  Tensor out = empty(x, {whole.rows, whole.cols});
  if (p == 1) return torch::stable::zero_(out);
  if (x.numel() == 0) return out;
  const Tensor in = torch::stable::contiguous(x);
  const OnDevice device(x, kName);
  by_dtype(whole.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Dropout<T> op{static_cast<const T*>(in.const_data_ptr()),
                        data_of<T>(out),
                        whole.rows,
                        whole.cols,
                        static_cast<const int64_t*>(seed.const_data_ptr()),
                        dropout_threshold(p),
                        static_cast<float>(1 / (1 - p))};
    check_launch(dropout(op, device.stream()), kName);
  });
  return out;
}

}  // namespace cuda
}  // namespace lora_fast
