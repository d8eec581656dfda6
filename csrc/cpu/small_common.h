// What the two directions of the small-batch linear share.
#pragma once

#include <cstring>

#include "../checks.h"
#include "few_tokens.h"
#include "rank_tile.h"

namespace lora_fast {

// weight [N, K] with adjacent columns, both sizes multiples of a tile step
inline void check_shape_of_tiles(const Tensor& weight) {
  STD_TORCH_CHECK(weight.stride(1) == 1, "weight must have adjacent columns");
  STD_TORCH_CHECK(weight.size(0) % kSmallRows == 0 && weight.size(1) % kSmallDepth == 0,
                  "weight must have sizes that are multiples of 32, got ", weight.size(0), " and ",
                  weight.size(1));
}

// The same, for AMX
inline void check_tiled_weight(const Tensor& weight) {
  check_matrix(weight, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16, "weight must be bfloat16, got dtype number ",
                  static_cast<int>(weight.scalar_type()));
  check_shape_of_tiles(weight);
  STD_TORCH_CHECK(amx_enabled(),
                  "weight needs AMX-bf16 here, which this processor lacks or allow_amx turned off");
}

// The same, for few tokens, which any processor takes in the three dtypes that it reads
inline void check_few_tokens_weight(const Tensor& weight) {
  check_matrix(weight, "weight");
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double,
                  "weight must be float32, bfloat16 or float16, got float64");
  check_shape_of_tiles(weight);
}

inline void check_few_tokens(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) >= 1 && tensor.size(0) <= kSmallTokens, name,
                  " must have 1 to 32 rows, got ", tensor.size(0));
}

template <class T>
inline const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const bf16* elements(const Tensor& tensor) {
  return data_of<bf16>(tensor);
}

// How many blocks of 32 rows or columns of W, `length` long, are worth a thread: 64 KB of them.
template <class T>
inline int64_t blocks_of_a_thread(int64_t length) {
  constexpr int64_t kElements = 65536 / sizeof(T);
  return std::max<int64_t>(1, kElements / (32 * length));
}

// Runs the statement with T bound to the storage type of dtype, which is no double.
#define LORA_FAST_BY_SHORT_DTYPE(dtype, T, ...)              \
  if (dtype == torch::headeronly::ScalarType::BFloat16) {    \
    using T = bf16;                                          \
    __VA_ARGS__;                                             \
  } else if (dtype == torch::headeronly::ScalarType::Half) { \
    using T = f16;                                           \
    __VA_ARGS__;                                             \
  } else {                                                   \
    using T = float;                                         \
    __VA_ARGS__;                                             \
  }

}  // namespace lora_fast
