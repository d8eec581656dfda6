#include "rank_tile_amx.h"
#include "tiles.h"

#if LORA_FAST_HAS_AVX512_BF16

namespace lora_fast {
namespace {

// c [8][32] = P Q: eight rows of P (row stride depth) and two groups of sixteen columns, so that all sums
// stay in registers
LORA_FAST_AVX512_BF16 LORA_FAST_INLINE void multiply(const bf16* p, const bf16* panel, int64_t depth,
                                                     float* c) {
  constexpr int64_t kRows = 8;
  f32x16 acc[kRows][2] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    const auto low = load_bits<u32x16>(panel + k * kLanes),
               high = load_bits<u32x16>(panel + (depth + k) * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const u32x16 x = load_bits<uint32_t>(p + r * depth + k) - u32x16{};
      acc[r][0] = add_pair_products(acc[r][0], x, low);
      acc[r][1] = add_pair_products(acc[r][1], x, high);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    store_bits(c + r * kTileCols, acc[r][0]);
    store_bits(c + r * kTileCols + kLanes, acc[r][1]);
  }
}

}  // namespace

LORA_FAST_AVX512_BF16 void avx512_bf16_rank_tile(const bf16* p, const bf16* panel, int64_t steps,
                                                 int64_t step, float* c, int64_t rows, int64_t cols) {
  const int64_t depth = steps * step;
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < cols; j += kStrip)
      multiply(p + i * depth, panel + j * depth, depth, c + i * kTileCols + j);
}

}  // namespace lora_fast

#else

#include <cstdlib>

namespace lora_fast {

// avx512_bf16_enabled() is false here, so that nothing calls this.
void avx512_bf16_rank_tile(const bf16*, const bf16*, int64_t, int64_t, float*, int64_t, int64_t) {
  std::abort();
}

}  // namespace lora_fast

#endif
