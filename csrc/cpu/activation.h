// The activations of a gated MLP and their derivatives:
//   silu       z σ(z)
//   gelu       z Φ(z), Φ the normal distribution's
//   gelu_tanh  z σ(2 √(2/π) (z + 0.044715 z³)) = 0.5 z (1 + tanh(√(2/π) (z + 0.044715 z³)))
// Sums and differences that would cancel are not formed, and nothing overflows where the result does not.
#pragma once

#include <cmath>

#include "vec.h"

namespace lora_fast {

enum class Activation : int64_t { kSilu, kGelu, kGeluTanh };

template <class F>
LORA_FAST_INLINE Vec<F> clamped(Vec<F> x, F low, F high) {  // NaN stays
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

// e^x to 1e-7 of it: 2^n e^r with |r| ≤ ln 2 / 2, e^r by its Taylor series; 0 below 2^-126, infinity beyond
// 2^127.
LORA_FAST_INLINE f32x16 exp_of(f32x16 x) {
  const f32x16 rounds = splat(12582912.0f);  // 1.5 · 2^23, whose last digit is 1
  const f32x16 within = clamped(x, -87.0f, 88.0f);
  const f32x16 shifted = within * 1.44269504088896341f + rounds;
  const f32x16 n = shifted - rounds;
  const f32x16 r = (within - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
  f32x16 p = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const u32x16 scale = ((u32x16)shifted << 23) + (127u << 23);
  f32x16 y = p * (f32x16)scale;
  y = x < splat(-87.0f) ? f32x16{} : y;
  y = x > splat(88.0f) ? splat(__builtin_inff()) : y;
  return x == x ? y : x;
}

template <class Function>
LORA_FAST_INLINE f64x16 each_lane(f64x16 x, const Function& f) {
  for (int64_t l = 0; l < kLanes; ++l) x[l] = f(x[l]);
  return x;
}

LORA_FAST_INLINE f64x16 exp_of(f64x16 x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}

// Φ(-u) / e^(-u²/2) for u ≥ 0, to 4e-9 of it: a polynomial in 1 / (1 + 0.3 u), fitted up to u = 14.5, beyond
// which e^(-u²/2) is 0 in float32.
LORA_FAST_INLINE f32x16 normal_tail_ratio(f32x16 u) {
  const f32x16 t = 1.0f / (1.0f + 0.3f * u);
  f32x16 p = splat(-0.020623515203715574f);
  for (const float c : {0.1124358607780658f, -0.2282141725022378f, 0.1917852810907017f, -0.07942409329352601f,
                        0.09615714294669842f, 0.07838954778752151f, 0.11023544511168748f,
                        0.11957181163712592f, 0.11968668991783613f})
    p = p * t + c;
  return p * t;
}

template <class F>
struct Activated {
  Vec<F> value, slope;
};

template <class F>
LORA_FAST_INLINE Activated<F> sigmoid_unit(Vec<F> z, Vec<F> near, Vec<F> argument, Vec<F> inner) {
  // near is z, but finite where the slope is 0 or 1
  const Vec<F> e = exp_of(-argument);
  const Vec<F> sigmoid = F{1} / (F{1} + e);
  const Vec<F> rest = e > splat(F{1e30}) ? splat(F{1}) : e * sigmoid;  // 1 - σ
  return {z * sigmoid, sigmoid * (F{1} + near * rest * inner)};
}

template <class F>
LORA_FAST_INLINE Activated<F> activated(Vec<F> z, Activation activation) {
  if (activation == Activation::kSilu) {
    return sigmoid_unit<F>(z, clamped(z, F{-1000}, F{1000}), z, splat(F{1}));
  }
  if (activation == Activation::kGeluTanh) {
    constexpr F scale = static_cast<F>(1.59576912160573071);  // 2 √(2/π)
    const Vec<F> near = clamped(z, F{-30}, F{30}), squares = near * near;
    const Vec<F> argument = near * (scale + scale * F{0.044715} * squares);
    return sigmoid_unit<F>(z, near, argument, scale + 3 * scale * F{0.044715} * squares);
  }
  constexpr F density = static_cast<F>(0.39894228040143268);  // 1 / √(2π)
  const Vec<F> bell = exp_of(z * z * F{-0.5});
  Vec<F> cdf;
  if constexpr (sizeof(F) == 4) {
    const Vec<F> tail = bell * normal_tail_ratio(z < splat(F{0}) ? -z : z);
    cdf = z < splat(F{0}) ? tail : F{1} - tail;
  } else {
    cdf = each_lane(z, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752); });
  }
  return {z * cdf, cdf + z * bell * density};
}

}  // namespace lora_fast
