#include "quantised_rows.h"

#if LORA_FAST_HAS_AVX512_BF16
#include "tiles.h"
#endif

namespace lora_fast {
namespace {

// out [kStrip] = a strip of W that was rounded to T, in order
template <class T>
LORA_FAST_INLINE void store_rounded(T* out, Strip<float> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_bits(out, ((u32x16)x.even >> 16) | (u32x16)x.odd);
  } else {
    if constexpr (!kDealt<T>) undeal_strip(x.even, x.odd);
    store_strip<float>(out, x);
  }
}

template <class T, bool four_bits>
LORA_FAST_CLONES void make(const QuantisedWeight& w, int64_t n, T* out) {
  const bool looks_up = has_avx512_vectors();
  alignas(64) float levels[kLanes], numbers[kLanes], strip[kStrip];  // numbers: see QuantisedTile
  if constexpr (four_bits) std::transform(w.levels, w.levels + kLanes, levels, with_usual_nan);
  for (int64_t i = n; i < n + kSmallRows; ++i, out += w.cols) {
    for (int64_t j = 0; j < w.cols; j += kStrip) {
      if (w.strips_have_one_scale && j % w.block == 0) {
        std::fill_n(numbers, kLanes, with_usual_nan(w.scale_of(i)[j / w.block]));
        if constexpr (four_bits)
          store<float>(numbers, rounded_but_nan<T>(load<float>(levels) * load<float>(numbers)));
      }
      Strip<float> x;
      if (!w.strips_have_one_scale) {
        x = strip_by_elements<T, four_bits>(w, i, j);
      } else if constexpr (!four_bits) {
        x = scaled_strip<T>(w.row(i) + j, numbers);
      } else if (looks_up) {
        x = look_up_strip(w.row(i) + j / 2, numbers);
      } else {
        load_strip_of_codes(w.row(i) + j / 2, numbers, strip);
        x = load_packed(strip);
      }
      store_rounded(out + j, x);
    }
  }
}

#if LORA_FAST_HAS_AVX512_BF16
using u16x32 = uint16_t __attribute__((vector_size(64)));

// The sixteen numbers of a block lie in a table twice each, so that the lowest bit of an index into it, which
// has five, may be anything: a byte's high code is moved down by three bits, the low one up by one.
struct FourBitBlock {
  static constexpr int64_t kInByte = 2;
  const __m512 levels;

  LORA_FAST_AVX512_BF16 LORA_FAST_INLINE u32x16 prepare(float scale) const {
    const __m256bh numbers = _mm512_cvtneps_pbh(levels * _mm512_set1_ps(scale));
    const auto low = (u32x16)_mm512_cvtepu16_epi32((__m256i)numbers);
    return low | low << 16;
  }
  LORA_FAST_AVX512_BF16 LORA_FAST_INLINE u32x16 strip(u32x16 table, const uint8_t* codes) const {
    const auto pairs = (u32x16)_mm512_cvtepu8_epi32(load_bits<__m128i>(codes));
    return (u32x16)__builtin_shuffle((u16x32)table, (u16x32)(pairs >> 3 | pairs << 17));
  }
};

struct EightBitBlock {
  static constexpr int64_t kInByte = 1;

  LORA_FAST_AVX512_BF16 LORA_FAST_INLINE __m512 prepare(float scale) const { return _mm512_set1_ps(scale); }
  LORA_FAST_AVX512_BF16 LORA_FAST_INLINE u32x16 strip(__m512 scale, const uint8_t* codes) const {
    return (u32x16)_mm512_cvtne2ps_pbh(values(codes + kLanes) * scale, values(codes) * scale);
  }
  LORA_FAST_AVX512_BF16 LORA_FAST_INLINE static __m512 values(const uint8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(codes)));
  }
};

// out [32][K] = W's rows of bfloat16, by the instructions that look up and round 32 numbers at once. The
// codes of as many rows behind them are fetched meanwhile.
template <class Block>
LORA_FAST_AVX512_BF16 LORA_FAST_INLINE void make_blocks(const QuantisedWeight& w, int64_t n, bf16* out,
                                                        const Block& block) {
  const int64_t ahead = kSmallRows * w.row_bytes;
  for (int64_t i = n; i < n + kSmallRows; ++i, out += w.cols) {
    const uint8_t* codes = w.row(i);
    const float* scale = w.scale_of(i);
    for (int64_t j = 0; j < w.cols; ++scale) {
      const auto made = block.prepare(*scale);
      for (const int64_t end = j + w.block; j < end; j += kStrip) {
        const uint8_t* at = codes + j / Block::kInByte;
        __builtin_prefetch(at + ahead, 0, 2);
        store_bits(out + j, block.strip(made, at));
      }
    }
  }
}

// c [kDotRows][ld_c] = as many rows of W times `count` columns, stretch by stretch (see DotColumns)
template <int64_t count, class Block>
LORA_FAST_AVX512_BF16 LORA_FAST_INLINE void multiply_blocks(const QuantisedWeight& w, int64_t n,
                                                            const DotColumns& columns, float* c, int64_t ld_c,
                                                            const Block& block) {
  constexpr int64_t R = kDotRows, stretch = dot_stretch<bf16>(count);
  const int64_t ahead = R * w.row_bytes;
  const bf16* x = static_cast<const bf16*>(columns.data);
  f32x16 sums[count][R] = {};
  for (int64_t k = 0; k < w.cols; k += stretch) {
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
          const u32x16 strip = block.strip(made[r], codes);
#pragma GCC unroll 4
          for (int64_t t = 0; t < count; ++t)
            acc[t][r] =
                add_pair_products(acc[t][r], strip, load_bits<u32x16>(x + k * count + t * length + j - k));
        }
      }
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < R; ++r) sums[t][r] += acc[t][r];
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < R; ++r) c[r * ld_c + t] = _mm512_reduce_add_ps((__m512)sums[t][r]);
}

template <int64_t most, class Block>
LORA_FAST_AVX512_BF16 LORA_FAST_INLINE void multiply_up_to(const QuantisedWeight& w, int64_t n,
                                                           const DotColumns& columns, float* c, int64_t ld_c,
                                                           const Block& block) {
  if constexpr (most > 1) {
    if (columns.count < most) return multiply_up_to<most - 1>(w, n, columns, c, ld_c, block);
  }
  for (int64_t i = 0; i < kSmallRows; i += kDotRows)
    multiply_blocks<most>(w, n + i, columns, c + i * ld_c, ld_c, block);
}

LORA_FAST_AVX512_BF16 void make_pairs(const QuantisedWeight& w, int64_t n, bf16* out) {
  w.levels != nullptr ? make_blocks(w, n, out, FourBitBlock{_mm512_loadu_ps(w.levels)})
                      : make_blocks(w, n, out, EightBitBlock{});
}

LORA_FAST_AVX512_BF16 void multiply_pairs(const QuantisedWeight& w, int64_t n, const DotColumns& columns,
                                          float* c, int64_t ld_c) {
  w.levels != nullptr
      ? multiply_up_to<kFewest>(w, n, columns, c, ld_c, FourBitBlock{_mm512_loadu_ps(w.levels)})
      : multiply_up_to<kFewest>(w, n, columns, c, ld_c, EightBitBlock{});
}
#endif

}  // namespace

template <class T>
void make_rows(const QuantisedWeight& w, int64_t n, T* out) {
#if LORA_FAST_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>) {
    if (avx512_bf16_enabled() && w.strips_have_one_scale) return make_pairs(w, n, out);
  }
#endif
  w.levels != nullptr ? make<T, true>(w, n, out) : make<T, false>(w, n, out);
}

bool multiplies_codes(const QuantisedWeight& w, int64_t columns) {
  return w.strips_have_one_scale && columns <= kFewest && w.dtype == ScalarType::BFloat16 &&
         products_of<bf16>() == Products::pairs;
}

void codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns, float* c, int64_t ld_c) {
#if LORA_FAST_HAS_AVX512_BF16
  multiply_pairs(w, n, columns, c, ld_c);
#endif
}

template void make_rows(const QuantisedWeight&, int64_t, float*);
template void make_rows(const QuantisedWeight&, int64_t, bf16*);
template void make_rows(const QuantisedWeight&, int64_t, f16*);

}  // namespace lora_fast
