// The part of a kept norm's key that the host knows without looking at the elements
// (lora_fast/content_key.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "include/lora_fast/content_hash.h"

namespace lora_fast {

inline uint64_t host_key(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_A,
                         const torch::stable::Tensor& lora_B, double scaling, bool per_output,
                         int64_t version) {
  uint64_t key = 0, position = 0;
  const auto add = [&](uint64_t number) { key += hash_word(number, kLoneHigh, position++); };
  add(reinterpret_cast<uintptr_t>(weight.const_data_ptr()));
  add(static_cast<uint64_t>(version));
  for (const auto* tensor : {&weight, &lora_A, &lora_B}) {
    add(static_cast<uint64_t>(tensor->scalar_type()));
    for (int64_t d = 0; d < 2; ++d) {
      add(static_cast<uint64_t>(tensor->size(d)));
      add(static_cast<uint64_t>(tensor->stride(d)));
    }
  }
  uint64_t bits;
  std::memcpy(&bits, &scaling, sizeof(bits));
  add(bits);
  add(per_output ? 1 : 0);
  return key;
}

}  // namespace lora_fast
