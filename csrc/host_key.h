// The part of a kept norm's key that the host knows without looking at the elements
// (lora_fast/content_key.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "include/lora_fast/content_hash.h"

namespace lora_fast {

class HostKey {
 public:
  void add(uint64_t number) { key_ += hash_word(number, kLoneHigh, position_++); }

  void add(double number) {
    uint64_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    add(bits);
  }

  // Where a part of W lies.
  void add_place(const torch::stable::Tensor& tensor, int64_t version) {
    add(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr())));
    add(static_cast<uint64_t>(version));
  }

  void add_form(const torch::stable::Tensor& tensor) {
    add(static_cast<uint64_t>(tensor.scalar_type()));
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      add(static_cast<uint64_t>(tensor.size(d)));
      add(static_cast<uint64_t>(tensor.stride(d)));
    }
  }

  uint64_t value() const { return key_; }

 private:
  uint64_t key_ = 0, position_ = 0;
};

inline uint64_t host_key(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_A,
                         const torch::stable::Tensor& lora_B, double scaling, bool per_output,
                         int64_t version) {
  HostKey key;
  key.add_place(weight, version);
  for (const auto* tensor : {&weight, &lora_A, &lora_B}) key.add_form(*tensor);
  key.add(scaling);
  key.add(uint64_t{per_output});
  return key.value();
}

}  // namespace lora_fast
