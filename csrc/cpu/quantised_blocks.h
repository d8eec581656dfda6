// Products with the codes of a quantised W in whole strips, which AVX-512 makes into rows in registers.
// Included after LORA_FAST_TARGET, the instruction set of all that is here: GCC takes conversions apart for
// the one that a function has itself, and not for that of the function which it is inlined into.
//
// A Block says how the codes of a block, which share a scale, are multiplied:
//   kInByte              codes
//   Column               an element of the columns that rows are multiplied with
//   prepare(scale)       what its codes are made with
//   strip(made, codes)   32 codes' numbers, rounded to W's dtype
//   add(sums, strip, x)  sixteen sums and the strip's products with 32 elements of a column
#include "quantised_rows.h"
#include "tiles.h"

namespace lora_fast {
namespace {

// A word in every lane. As integers, because GCC makes such a vector of floats lane by lane.
LORA_FAST_TARGET LORA_FAST_INLINE f32x16 repeat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (f32x16)(bits - u32x16{});
}

LORA_FAST_TARGET LORA_FAST_INLINE u32x16 load_bytes(const uint8_t* p) {
  return (u32x16)_mm512_cvtepu8_epi32(load_bits<__m128i>(p));
}

LORA_FAST_TARGET LORA_FAST_INLINE f32x16 load_signed_bytes(const uint8_t* p) {
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(p)));
}

// c [kDotRows][ld_c] = as many rows of W times `count` columns, stretch by stretch (see DotColumns). The
// codes of as many rows behind them are fetched meanwhile.
template <int64_t count, class Block>
LORA_FAST_TARGET LORA_FAST_INLINE void multiply_rows(const QuantisedWeight& w, int64_t n,
                                                     const typename Block::Column* x, float* c, int64_t ld_c,
                                                     const Block& block) {
  constexpr int64_t R = kDotRows, stretch = dot_stretch<typename Block::Column>(count);
  const int64_t ahead = R * w.row_bytes;
  f32x16 sums[count][R] = {};
  for (int64_t k = 0; k < w.cols; k += stretch, x += count * stretch) {
    const int64_t length = std::min(stretch, w.cols - k);
    f32x16 acc[count][R] = {};
    for (int64_t j = k; j < k + length;) {
      decltype(block.prepare(0.0f)) made[R];
      for (int64_t r = 0; r < R; ++r) made[r] = block.prepare(w.scale_of(n + r)[j / w.block]);
      for (const int64_t end = std::min(k + length, (j / w.block + 1) * w.block); j < end; j += kStrip) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
          const uint8_t* codes = w.row(n + r) + j / Block::kInByte;
          __builtin_prefetch(codes + ahead, 0, 2);
          const auto strip = block.strip(made[r], codes);
#pragma GCC unroll 4
          for (int64_t t = 0; t < count; ++t)
            acc[t][r] = Block::add(acc[t][r], strip, x + t * length + j - k);
        }
      }
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < R; ++r) sums[t][r] += acc[t][r];
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < R; ++r) c[r * ld_c + t] = _mm512_reduce_add_ps((__m512)sums[t][r]);
}

// The same for 32 rows and at most `most` columns, as many as there are
template <int64_t most, class Block>
LORA_FAST_TARGET LORA_FAST_INLINE void multiply_up_to(const QuantisedWeight& w, int64_t n,
                                                      const DotColumns& columns, float* c, int64_t ld_c,
                                                      const Block& block) {
  if constexpr (most > 1) {
    if (columns.count < most) return multiply_up_to<most - 1>(w, n, columns, c, ld_c, block);
  }
  const auto* x = static_cast<const typename Block::Column*>(columns.data);
  for (int64_t i = 0; i < kSmallRows; i += kDotRows)
    multiply_rows<most>(w, n + i, x, c + i * ld_c, ld_c, block);
}

}  // namespace
}  // namespace lora_fast
