// lora_A and lora_B in the dtype of the products around them, both in one launch: what float32 adapters of a
// 16-bit linear cost before the tensor cores take them.
#pragma once

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

constexpr int kRoundThreads = 256;
constexpr int64_t kRoundBlocks = 256;

// Contiguous; a factor that is of the dtype already has no elements here.
template <class T>
struct RoundFactors {
  const void *lora_A, *lora_B;
  Dtype dtype_A, dtype_B;
  int64_t elements_A, elements_B;
  T *rounded_A, *rounded_B;
};

template <class T>
LORA_FAST_KERNEL(kRoundThreads, 4)
round_factors_kernel(RoundFactors<T> op) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRoundThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kRoundThreads;
  for (int64_t at = thread; at < op.elements_A + op.elements_B; at += threads) {
    const int64_t in_B = at - op.elements_A;
    if (in_B < 0)
      op.rounded_A[at] = rounded<T>(element(op.lora_A, op.dtype_A, at));
    else
      op.rounded_B[in_B] = rounded<T>(element(op.lora_B, op.dtype_B, in_B));
  }
}

template <class T>
cudaError_t round_factors(const RoundFactors<T>& op, cudaStream_t stream) {
  const int64_t blocks = divide_up(op.elements_A + op.elements_B, kRoundThreads);
  return launch(round_factors_kernel<T>, dim3(blocks < kRoundBlocks ? blocks : kRoundBlocks), kRoundThreads,
                0, false, stream, op);
}

}  // namespace lora_fast::cuda
