// Whether every element of a matrix is zero, of either sign; found out at the first that is not.
#include <algorithm>

#include "../checks.h"
#include "ops.h"

namespace lora_fast {
namespace {

template <class Word>
bool all_zero(const Tensor& matrix) {
  const auto* words = static_cast<const Word*>(matrix.const_data_ptr());
  constexpr int64_t kBlock = 1024;
  for (int64_t first = 0; first < matrix.numel(); first += kBlock) {
    Word any = 0;
    for (int64_t i = first; i < std::min(first + kBlock, matrix.numel()); ++i) any |= words[i];
    if (static_cast<Word>(any << 1) != 0) return false;
  }
  return true;
}

}  // namespace

bool cpu::is_zero(Tensor matrix) {
  check_matrix(matrix, "matrix");
  check_contiguous(matrix, "matrix");
  const auto size = matrix.element_size();
  STD_TORCH_CHECK(size == 2 || size == 4, "matrix must have elements of 2 or 4 bytes, got ", size);
  return size == 2 ? all_zero<uint16_t>(matrix) : all_zero<uint32_t>(matrix);
}

}  // namespace lora_fast
