#include <lora_fast/weight_norm.cuh>

#include "../host_key.h"
#include "binding.h"
#include "ops.h"

namespace lora_fast {
namespace cuda {
namespace {

// The norm into `norm`, and what is kept; enqueued.
void enqueue(const Operand& weight, const Operand& lora_A, const Operand& lora_B, double scaling,
             bool per_output, Tensor& norm, const Kept& kept, const char* name, cudaStream_t stream) {
  by_dtypes(weight.dtype, lora_A.dtype, lora_B.dtype, [&](auto type, auto factors) {
    using T = typename decltype(type)::type;
    using E = typename decltype(factors)::type;
    WeightNorm<T> op{};
    check_launch(plan_weight_norm<T, E>(weight, lora_A, lora_B, static_cast<float>(scaling), per_output, &op),
                 name);
    Tensor partial = empty(norm, {op.splits * op.lines});
    op.partial = data_of<float>(partial);
    op.norm = data_of<float>(norm);
    op.kept = kept;
    check_launch(weight_norm<T, E>(op, per_output, is_transposed(weight), stream), name);
  });
}

// The lines along dimension 1 - outer.
Bits bits_of(const Tensor& tensor, int outer) {
  return {tensor.const_data_ptr(),
          tensor.size(outer),
          tensor.size(1 - outer),
          tensor.stride(outer),
          tensor.stride(1 - outer),
          static_cast<int>(tensor.element_size()),
          false};
}

// In the order in which a factor's elements make words.
Bits factor_bits(const Tensor& tensor) {
  Bits bits = bits_of(tensor, tensor.stride(0) < tensor.stride(1) ? 1 : 0);
  bits.vector = bits.col_stride == 1 && bits.row_stride == bits.cols && is_aligned(bits.data) &&
                tensor.numel() * bits.width % kWordBytes == 0;
  return bits;
}

}  // namespace

Tensor weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output) {
  constexpr auto kName = "weight_norm_fwd";
  check_adapter(weight, lora_A, lora_B);
  const Operand w = operand(weight, "weight", weight), a = operand(lora_A, "lora_A", weight),
                b = operand(lora_B, "lora_B", weight);
  Tensor norm = empty(weight, {per_output ? w.rows : w.cols}, ScalarType::Float);
  if (weight.numel() == 0) return torch::stable::zero_(norm);
  const OnDevice device(weight, kName);
  enqueue(w, a, b, scaling, per_output, norm, Kept{}, kName, device.stream());
  return norm;
}

Tensor weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        Tensor kept_norm, Tensor kept_key, int64_t version) {
  constexpr auto kName = "weight_norm_kept";
  check_adapter(weight, lora_A, lora_B);
  const Operand w = operand(weight, "weight", weight), a = operand(lora_A, "lora_A", weight),
                b = operand(lora_B, "lora_B", weight);
  Tensor norm = empty(weight, {per_output ? w.rows : w.cols}, ScalarType::Float);
  float_data(kept_norm, "kept_norm", norm.size(0), weight);
  vector_data(kept_key, "kept_key", kKeyLength, weight);
  STD_TORCH_CHECK(kept_key.scalar_type() == ScalarType::Long, "kept_key must be int64");
  if (weight.numel() == 0) return torch::stable::zero_(norm);
  const OnDevice device(weight, kName);

  const Bits a_bits = factor_bits(lora_A), b_bits = factor_bits(lora_B);
  const int64_t blocks = content_key_blocks(lora_A.numel() * a_bits.width + lora_B.numel() * b_bits.width);
  constexpr int64_t kState = divide_up(sizeof(KeptState), sizeof(uint64_t));
  Tensor shared = empty(weight, {kState + kKeyHashes * blocks}, ScalarType::Long);
  uint64_t* words = data_of<uint64_t>(shared);
  KeptState* state = reinterpret_cast<KeptState*>(words);
  uint64_t *hashes = words + kState, *key = data_of<uint64_t>(kept_key);
  check_launch(content_key({bits_of(weight, 0), a_bits, b_bits, key, state, hashes}, blocks, device.stream()),
               kName);

  const uint64_t host = host_key(weight, lora_A, lora_B, scaling, per_output, version);
  const Kept kept{data_of<float>(kept_norm), key, host, hashes, blocks, state};
  enqueue(w, a, b, scaling, per_output, norm, kept, kName, device.stream());
  return norm;
}

}  // namespace cuda
}  // namespace lora_fast
