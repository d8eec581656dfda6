// Sixteen-lane vectors in GCC's vector extension, and exact conversions between them and memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace lora_fast {

constexpr int64_t kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using f64x16 = double __attribute__((vector_size(128)));
using f64x8 = double __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using u32x16 = uint32_t __attribute__((vector_size(64)));

// Storage of the 16-bit types; arithmetic is float or double.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class F>
struct VecOf;
template <>
struct VecOf<float> {
  using type = f32x16;
};
template <>
struct VecOf<double> {
  using type = f64x16;
};
template <class F>
using Vec = typename VecOf<F>::type;

template <class F>
LORA_FAST_INLINE Vec<F> splat(F x) {
  return x - Vec<F>{};
}

template <class V, class P>
LORA_FAST_INLINE V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class P>
LORA_FAST_INLINE void store_bits(P* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// float16 to float32: rebias the exponent; Inf and NaN keep an all-ones exponent, subnormals are made normal.
LORA_FAST_INLINE f32x16 widen_f16(u16x16 h) {
  const u32x16 x = __builtin_convertvector(h, u32x16);
  const u32x16 magnitude = (x & 0x7fffu) << 13;
  const u32x16 rebias = u32x16{} + (112u << 23);
  const u32x16 normal = magnitude + rebias;
  const u32x16 special = magnitude + 2 * rebias;
  const u32x16 one = u32x16{} + (113u << 23);
  const f32x16 subnormal = (f32x16)(magnitude + one) - (f32x16)one;
  u32x16 bits = magnitude < (1u << 23) ? (u32x16)subnormal : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return (f32x16)(bits | ((x & 0x8000u) << 16));
}

LORA_FAST_INLINE u16x16 narrow_f16(f32x16 f) {
  const u32x16 x = (u32x16)f;
  const u32x16 magnitude = x & 0x7fffffffu;
  const u32x16 half = u32x16{} + (126u << 23);
  // Adding 0.5 shifts a subnormal result to the low bits, rounded by the addition itself.
  const u32x16 subnormal = (u32x16)((f32x16)magnitude + (f32x16)half) - half;
  const u32x16 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32x16 nan = u32x16{} + 0x7e00u, inf = u32x16{} + 0x7c00u;
  u32x16 bits = magnitude < (113u << 23) ? subnormal : normal;
  bits = magnitude >= (143u << 23) ? inf : bits;
  bits = magnitude > 0x7f800000u ? nan : bits;
  return __builtin_convertvector(bits | ((x >> 16) & 0x8000u), u16x16);
}

LORA_FAST_INLINE f32x16 widen_bf16(u16x16 h) {
  return (f32x16)(__builtin_convertvector(h, u32x16) << 16);
}

LORA_FAST_INLINE u16x16 narrow_bf16(f32x16 f) {
  const u32x16 x = (u32x16)f;
  const u32x16 rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  const u32x16 nan = (x >> 16) | 0x40u;
  return __builtin_convertvector((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded, u16x16);
}

LORA_FAST_INLINE f32x16 load_f32(const float* p) {
  return load_bits<f32x16>(p);
}
LORA_FAST_INLINE f32x16 load_f32(const bf16* p) {
  return widen_bf16(load_bits<u16x16>(p));
}
LORA_FAST_INLINE f32x16 load_f32(const f16* p) {
  return widen_f16(load_bits<u16x16>(p));
}
LORA_FAST_INLINE f32x16 load_f32(const double* p) {
  return __builtin_convertvector(load_bits<f64x16>(p), f32x16);
}
LORA_FAST_INLINE void store_f32(float* p, f32x16 v) {
  store_bits(p, v);
}
LORA_FAST_INLINE void store_f32(bf16* p, f32x16 v) {
  store_bits(p, narrow_bf16(v));
}
LORA_FAST_INLINE void store_f32(f16* p, f32x16 v) {
  store_bits(p, narrow_f16(v));
}
LORA_FAST_INLINE void store_f32(double* p, f32x16 v) {
  store_bits(p, __builtin_convertvector(v, f64x16));
}

// Sixteen elements of any storage type as F.
template <class F, class T>
LORA_FAST_INLINE Vec<F> load(const T* p) {
  if constexpr (sizeof(F) == 4) {
    return load_f32(p);
  } else if constexpr (sizeof(T) == 8) {
    return load_bits<f64x16>(p);
  } else {
    return __builtin_convertvector(load_f32(p), f64x16);
  }
}

template <class F, class T>
LORA_FAST_INLINE void store(T* p, Vec<F> v) {
  if constexpr (sizeof(F) == 4) {
    store_f32(p, v);
  } else if constexpr (sizeof(T) == 8) {
    store_bits(p, v);
  } else {
    store_f32(p, __builtin_convertvector(v, f32x16));
  }
}

// The first n of sixteen elements; the other lanes are zero and are not written.
template <class F, class T>
LORA_FAST_INLINE Vec<F> load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load<F>(p);
  T part[kLanes];
  std::memset(part, 0, sizeof(part));
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load<F>(part);
}

template <class F, class T>
LORA_FAST_INLINE void store_n(T* p, Vec<F> v, int64_t n) {
  if (n >= kLanes) return store<F>(p, v);
  T part[kLanes];
  store<F>(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

template <class F>
LORA_FAST_INLINE double sum_lanes(Vec<F> v) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

}  // namespace lora_fast
