#include "quantised_rows.h"

#if LORA_FAST_HAS_AVX512_BF16

#define LORA_FAST_TARGET LORA_FAST_AVX512_BF16
#include "quantised_blocks.h"

namespace lora_fast {
namespace {

// The sixteen numbers of a block of 4 bits lie in a table twice each, so that the lowest bit of an index into
// it, which has five, may be anything: a byte's high code is moved down by three bits, the low one up by one.
template <bool four_bits>
struct PairBlock {
  using Column = bf16;
  using u16x32 = uint16_t __attribute__((vector_size(64)));
  static constexpr int64_t kInByte = four_bits ? 2 : 1;
  const f32x16 levels;

  LORA_FAST_TARGET LORA_FAST_INLINE u32x16 prepare(float scale) const {
    const f32x16 scales = repeat(scale);
    if constexpr (!four_bits) return (u32x16)scales;
    const auto numbers =
        (u32x16)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)(levels * scales)));
    return numbers | numbers << 16;
  }

  LORA_FAST_TARGET LORA_FAST_INLINE u32x16 strip(u32x16 made, const uint8_t* codes) const {
    if constexpr (four_bits) {
      const u32x16 pairs = load_bytes(codes);
      return (u32x16)__builtin_shuffle((u16x32)made, (u16x32)(pairs >> 3 | pairs << 17));
    } else {
      const f32x16 scales = (f32x16)made;
      const f32x16 low = load_signed_bytes(codes) * scales, high = load_signed_bytes(codes + kLanes) * scales;
      return (u32x16)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
  }

  LORA_FAST_TARGET LORA_FAST_INLINE static f32x16 add(f32x16 sums, u32x16 strip, const bf16* x) {
    return add_pair_products(sums, strip, load_bits<u32x16>(x));
  }
};

// The codes of the 32 rows behind these are fetched meanwhile.
template <class Block>
LORA_FAST_TARGET LORA_FAST_INLINE void make(const QuantisedWeight& w, int64_t n, bf16* out,
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

}  // namespace

LORA_FAST_TARGET void make_pair_rows(const QuantisedWeight& w, int64_t n, bf16* out) {
  w.levels != nullptr ? make(w, n, out, PairBlock<true>{levels_of(w)})
                      : make(w, n, out, PairBlock<false>{levels_of(w)});
}

LORA_FAST_TARGET void pair_codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns,
                                         float* c, int64_t ld_c) {
  w.levels != nullptr ? multiply_up_to<kFewest>(w, n, columns, c, ld_c, PairBlock<true>{levels_of(w)})
                      : multiply_up_to<kFewest>(w, n, columns, c, ld_c, PairBlock<false>{levels_of(w)});
}

}  // namespace lora_fast

#else

#include <cstdlib>

namespace lora_fast {

// avx512_bf16_enabled() is false here, so that nothing calls these.
void make_pair_rows(const QuantisedWeight&, int64_t, bf16*) {
  std::abort();
}
void pair_codes_forward(const QuantisedWeight&, int64_t, const DotColumns&, float*, int64_t) {
  std::abort();
}

}  // namespace lora_fast

#endif
