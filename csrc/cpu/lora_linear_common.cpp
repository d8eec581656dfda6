#include "lora_linear_common.h"

namespace lora_fast {
namespace {

template <class T>
LORA_FAST_CLONES void round_row(const T* m, int64_t cols, float factor, bf16* out, bf16* left) {
  for (int64_t i = 0; i < cols; i += kLanes) {
    const int64_t count = std::min(kLanes, cols - i);
    T part[kLanes] = {};
    std::memcpy(part, m + i, static_cast<size_t>(count) * sizeof(T));
    const f32x16 value = factor * load<float>(part);
    bf16 rounded[kLanes];
    store<float>(rounded, value);
    std::memcpy(out + i, rounded, static_cast<size_t>(count) * sizeof(bf16));
    if (left == nullptr) continue;
    const f32x16 rest = value - load<float>(rounded);
    // of an infinite value nothing is left
    store<float>(rounded, rest == rest ? rest : f32x16{});
    std::memcpy(left + i, rounded, static_cast<size_t>(count) * sizeof(bf16));
  }
}

}  // namespace

void round_rows(const AdapterMatrix& m, int64_t row, int64_t rows, float factor, bool split, int64_t width,
                bf16* out) {
  const int64_t filled = split ? 2 * m.cols : m.cols;
  for (int64_t i = 0; i < rows; ++i, out += width) {
    bf16* left = split ? out + m.cols : nullptr;
    if (m.wide) {
      round_row(static_cast<const float*>(m.data) + (row + i) * m.cols, m.cols, factor, out, left);
    } else {
      round_row(static_cast<const bf16*>(m.data) + (row + i) * m.cols, m.cols, factor, out, left);
    }
    std::memset(out + filled, 0, static_cast<size_t>(width - filled) * sizeof(bf16));
  }
}

}  // namespace lora_fast
