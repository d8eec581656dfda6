// Sums over tokens, column by column, whose error does not grow with the number of tokens.
#pragma once

#include "rank_tile.h"

namespace lora_fast {

// Rows whose sum is made in registers.
constexpr int64_t kGroup = 4;

// A level holds the sum of up to kFan sums of the level below it, the last of any number.
template <class F, int64_t kColumns>
struct Sums {
  static constexpr int64_t kLevels = 4, kFan = 16;
  alignas(64) F level[kLevels][kColumns] = {};

  // After `groups` groups, each level that is full goes into the one above.
  LORA_FAST_INLINE void carry(int64_t groups, int64_t cols) {
    for (int64_t l = 0; l + 1 < kLevels && groups % kFan == 0; ++l, groups /= kFan) empty(l, cols);
  }

  LORA_FAST_INLINE const F* total(int64_t cols) {
    for (int64_t l = 0; l + 1 < kLevels; ++l) empty(l, cols);
    return level[kLevels - 1];
  }

  // The strip at column k of the lowest level takes `part`.
  LORA_FAST_INLINE void add(int64_t k, const Strip<F>& part) {
    const Strip<F> old = load_packed(level[0] + k);
    store_packed<F>(level[0] + k, {old.even + part.even, old.odd + part.odd});
  }

 private:
  LORA_FAST_INLINE void empty(int64_t l, int64_t cols) {
    for (int64_t j = 0; j < round_up(cols, kStrip); ++j) level[l + 1][j] += level[l][j];
    std::fill_n(level[l], round_up(cols, kStrip), F{});
  }
};

// out[j0 ... j0 + cols) = sums, or nothing where out is null
template <class F>
LORA_FAST_INLINE void write_sums(void* out, const F* sums, int64_t j0, int64_t cols, bool dealt) {
  if (out == nullptr) return;
  for (int64_t j = 0; j < cols; ++j) static_cast<F*>(out)[j0 + j] = sums[dealt ? dealt_position(j) : j];
}

}  // namespace lora_fast
