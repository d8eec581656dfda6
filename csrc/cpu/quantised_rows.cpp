#include "quantised_rows.h"

#include <cstdlib>

#if LORA_FAST_HAS_AVX512_BF16
#define LORA_FAST_TARGET __attribute__((target("arch=x86-64-v4")))
#include "quantised_blocks.h"
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
  const f32x16 levels = levels_of(w);
  alignas(64) float numbers[kLanes], strip[kStrip];  // numbers: see QuantisedTile
  for (int64_t i = n; i < n + kSmallRows; ++i, out += w.cols) {
    for (int64_t j = 0; j < w.cols; j += kStrip) {
      if (w.strips_have_one_scale && j % w.block == 0) {
        std::fill_n(numbers, kLanes, with_usual_nan(w.scale_of(i)[j / w.block]));
        if constexpr (four_bits) store<float>(numbers, rounded_but_nan<T>(levels * load<float>(numbers)));
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
template <class T, bool four_bits>
struct FloatBlock {
  using Column = float;
  static constexpr int64_t kInByte = four_bits ? 2 : 1;
  const f32x16 levels;

  LORA_FAST_TARGET LORA_FAST_INLINE f32x16 prepare(float scale) const {
    const f32x16 scales = repeat(with_usual_nan(scale));
    if constexpr (!four_bits) return scales;
    return rounded_but_nan<T>(levels * scales);
  }

  // in the order of the columns: that of strips, but for float32
  LORA_FAST_TARGET LORA_FAST_INLINE Strip<float> strip(f32x16 made, const uint8_t* codes) const {
    Strip<float> x;
    if constexpr (four_bits) {
      const u32x16 pairs = load_bytes(codes);
      x = {look_up(made, pairs >> 4), look_up(made, pairs & 15u)};
      if constexpr (!kDealt<T>) undeal_strip(x.even, x.odd);
    } else {
      x = {load_signed_bytes(codes), load_signed_bytes(codes + kLanes)};
      if constexpr (kDealt<T>) deal_strip(x.even, x.odd);
      x = {rounded_but_nan<T>(x.even * made), rounded_but_nan<T>(x.odd * made)};
    }
    return x;
  }

  LORA_FAST_TARGET LORA_FAST_INLINE static f32x16 add(f32x16 sums, const Strip<float>& strip,
                                                      const float* x) {
    return sums + strip.even * load<float>(x) + strip.odd * load<float>(x + kLanes);
  }
};

template <class T>
LORA_FAST_TARGET void float_codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns,
                                          float* c, int64_t ld_c) {
  w.levels != nullptr ? multiply_up_to<kFewest>(w, n, columns, c, ld_c, FloatBlock<T, true>{levels_of(w)})
                      : multiply_up_to<kFewest>(w, n, columns, c, ld_c, FloatBlock<T, false>{levels_of(w)});
}
#endif

}  // namespace

template <class T>
void make_rows(const QuantisedWeight& w, int64_t n, T* out) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (products_of<T>() == Products::pairs && w.strips_have_one_scale) return make_pair_rows(w, n, out);
  }
  w.levels != nullptr ? make<T, true>(w, n, out) : make<T, false>(w, n, out);
}

template <class T>
bool multiplies_codes(const QuantisedWeight& w, int64_t columns) {
  return LORA_FAST_HAS_AVX512_BF16 && has_avx512_vectors() && products_of<T>() != Products::tiles &&
         columns <= kFewest && w.strips_have_one_scale;
}

template <class T>
void codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns, float* c, int64_t ld_c) {
#if LORA_FAST_HAS_AVX512_BF16
  products_of<T>() == Products::pairs ? pair_codes_forward(w, n, columns, c, ld_c)
                                      : float_codes_forward<T>(w, n, columns, c, ld_c);
#else
  std::abort();  // multiplies_codes() is false here, so that nothing calls this
#endif
}

#define LORA_FAST_INSTANTIATE(T)                                      \
  template void make_rows(const QuantisedWeight&, int64_t, T*);       \
  template bool multiplies_codes<T>(const QuantisedWeight&, int64_t); \
  template void codes_forward<T>(const QuantisedWeight&, int64_t, const DotColumns&, float*, int64_t);
LORA_FAST_INSTANTIATE(float)
LORA_FAST_INSTANTIATE(bf16)
LORA_FAST_INSTANTIATE(f16)

}  // namespace lora_fast
