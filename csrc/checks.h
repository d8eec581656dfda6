// Argument checks whose messages name the argument. Python validates first; these guard direct calls.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace lora_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_float(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(is_float_dtype(tensor.scalar_type()), name,
                  " must be float64, float32, bfloat16 or float16, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  check_float(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, " must have size ", expected, " in dimension ", dim,
                  ", got ", tensor.size(dim));
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size) {
  check_float(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1, name, " must have 1 dimension, got ", tensor.dim());
  check_size(tensor, name, 0, size);
}

// gain, norm and their gradients are never 16-bit: bfloat16 cannot tell gains near 1 apart.
inline void check_wide(const Tensor& tensor, const char* name, int64_t size) {
  check_vector(tensor, name, size);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
                  name, " must be float32 or float64, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
}

inline void check_same(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name);
  check_size(tensor, name, 0, like.size(0));
  check_size(tensor, name, 1, like.size(1));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// weight [N, K], lora_A [R, K], lora_B [N, R]
inline void check_adapter(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_matrix(weight, "weight");
  check_matrix(lora_A, "lora_A");
  check_matrix(lora_B, "lora_B");
  check_size(lora_A, "lora_A", 1, weight.size(1));
  check_size(lora_B, "lora_B", 0, weight.size(0));
  check_size(lora_B, "lora_B", 1, lora_A.size(0));
}

}  // namespace lora_fast
