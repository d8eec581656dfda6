#include <lora_fast/weight_norm.cuh>

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

Bits bits_of(const Tensor& tensor) {
  const int64_t width = static_cast<int64_t>(tensor.element_size());
  return {tensor.const_data_ptr(),
          tensor.size(0),
          tensor.size(1),
          tensor.stride(0),
          tensor.stride(1),
          static_cast<int>(width),
          tensor.is_contiguous() && is_aligned(tensor.const_data_ptr()) && tensor.numel() * width % 16 == 0};
}

// splitmix64's step
uint64_t mixed(uint64_t hash, uint64_t word) {
  uint64_t z = (hash ^ word) + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// What the host knows of the norm's inputs: W's pointer and version, all forms, the scaling and the axis.
void set_host_key(Kept& kept, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                  double scaling, bool per_output, int64_t version) {
  uint64_t form = 0;
  for (const Tensor* tensor : {&weight, &lora_A, &lora_B}) {
    form = mixed(form, static_cast<uint64_t>(tensor->scalar_type()));
    for (int64_t d = 0; d < 2; ++d) {
      form = mixed(form, static_cast<uint64_t>(tensor->size(d)));
      form = mixed(form, static_cast<uint64_t>(tensor->stride(d)));
    }
  }
  uint64_t bits = 0;
  static_assert(sizeof(bits) == sizeof(scaling));
  memcpy(&bits, &scaling, sizeof(bits));
  kept.host_key[0] = reinterpret_cast<uintptr_t>(weight.const_data_ptr());
  kept.host_key[1] = static_cast<uint64_t>(version);
  kept.host_key[2] = form;
  kept.host_key[3] = mixed(bits, per_output ? 1 : 0);
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

  const Bits weight_bits = bits_of(weight), a_bits = bits_of(lora_A), b_bits = bits_of(lora_B);
  const int64_t blocks = content_key_blocks(lora_A.numel() * a_bits.width + lora_B.numel() * b_bits.width);
  constexpr int64_t kState = divide_up(sizeof(KeptState), sizeof(uint64_t));
  Tensor shared = empty(weight, {kState + kKeyHashes * blocks}, ScalarType::Long);
  uint64_t* words = data_of<uint64_t>(shared);
  KeptState* state = reinterpret_cast<KeptState*>(words);
  uint64_t *hashes = words + kState, *key = data_of<uint64_t>(kept_key);
  check_launch(content_key({weight_bits, a_bits, b_bits, key, state, hashes}, blocks, device.stream()),
               kName);

  Kept kept{data_of<float>(kept_norm), key, {}, hashes, blocks, state};
  set_host_key(kept, weight, lora_A, lora_B, scaling, per_output, version);
  enqueue(w, a, b, scaling, per_output, norm, kept, kName, device.stream());
  return norm;
}

}  // namespace cuda
}  // namespace lora_fast
