// Sixteen-lane vectors in GCC's vector extension, and exact conversions between them and memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace lora_fast {

constexpr int64_t kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using f64x16 = double __attribute__((vector_size(128)));
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
LORA_FAST_INLINE f32x16 widen_f16(u32x16 x) {
  const u32x16 magnitude = (x & 0x7fffu) << 13;
  const u32x16 rebias = u32x16{} + (112u << 23);
  const u32x16 one = u32x16{} + (113u << 23);
  const f32x16 subnormal = (f32x16)(magnitude + one) - (f32x16)one;
  u32x16 bits = magnitude < (1u << 23) ? (u32x16)subnormal : magnitude + rebias;
  bits = magnitude >= (31u << 23) ? magnitude + 2 * rebias : bits;
  return (f32x16)(bits | ((x & 0x8000u) << 16));
}

// To nearest, ties to even, in the low half of each lane; NaN stays NaN.
LORA_FAST_INLINE u32x16 narrow_f16(f32x16 f) {
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
  return bits | ((x >> 16) & 0x8000u);
}

LORA_FAST_INLINE u32x16 narrow_bf16(f32x16 f) {
  const u32x16 x = (u32x16)f;
  const u32x16 rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  const u32x16 nan = (x >> 16) | 0x40u;
  return (x & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

LORA_FAST_INLINE f32x16 widen(u32x16 x, bf16) {
  return (f32x16)(x << 16);
}
LORA_FAST_INLINE f32x16 widen(u32x16 x, f16) {
  return widen_f16(x);
}
LORA_FAST_INLINE u32x16 narrow(f32x16 v, bf16) {
  return narrow_bf16(v);
}
LORA_FAST_INLINE u32x16 narrow(f32x16 v, f16) {
  return narrow_f16(v);
}

// Between float lanes and F's.
template <class F>
LORA_FAST_INLINE Vec<F> from_f32(f32x16 v) {
  if constexpr (sizeof(F) == 4) {
    return v;
  } else {
    return __builtin_convertvector(v, f64x16);
  }
}

template <class F>
LORA_FAST_INLINE f32x16 to_f32(Vec<F> v) {
  if constexpr (sizeof(F) == 4) {
    return v;
  } else {
    return __builtin_convertvector(v, f32x16);
  }
}

// Sixteen adjacent elements of any storage type as F.
template <class F, class T>
LORA_FAST_INLINE Vec<F> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return from_f32<F>(widen(__builtin_convertvector(load_bits<u16x16>(p), u32x16), T{}));
  } else if constexpr (sizeof(T) == sizeof(F)) {
    return load_bits<Vec<F>>(p);
  } else {
    return __builtin_convertvector(load_bits<Vec<T>>(p), Vec<F>);
  }
}

template <class F, class T>
LORA_FAST_INLINE void store(T* p, Vec<F> v) {
  if constexpr (sizeof(T) == 2) {
    store_bits(p, __builtin_convertvector(narrow(to_f32<F>(v), T{}), u16x16));
  } else if constexpr (sizeof(T) == sizeof(F)) {
    store_bits(p, v);
  } else {
    store_bits(p, __builtin_convertvector(v, Vec<T>));
  }
}

// A strip is 32 adjacent columns in two vectors. Of a 16-bit type they are de-interleaved ("dealt" in names):
// the even columns are in the first and the odd ones in the second, which costs a shift and a mask where
// widening in order costs shuffles; of wider types the vectors are the two halves. Operands that are combined
// with a strip lane by lane are packed in the same order.
constexpr int64_t kStrip = 2 * kLanes;

template <class T>
constexpr bool kDealt = sizeof(T) == 2;

// The index of a column in a de-interleaved line.
inline int64_t dealt_position(int64_t column) {
  const int64_t within = column % kStrip;
  return column - within + within % 2 * kLanes + within / 2;
}

template <class F>
struct Strip {
  Vec<F> even, odd;
};

template <class F, class T>
LORA_FAST_INLINE Strip<F> load_strip(const T* p) {
  if constexpr (kDealt<T>) {
    const u32x16 x = load_bits<u32x16>(p);
    if constexpr (std::is_same_v<T, bf16>) {
      return {from_f32<F>((f32x16)(x << 16)), from_f32<F>((f32x16)(x & 0xffff0000u))};
    } else {
      return {from_f32<F>(widen_f16(x)), from_f32<F>(widen_f16(x >> 16))};
    }
  } else {
    return {load<F>(p), load<F>(p + kLanes)};
  }
}

template <class F, class T>
LORA_FAST_INLINE void store_strip(T* p, Strip<F> s) {
  if constexpr (kDealt<T>) {
    store_bits(p, narrow(to_f32<F>(s.even), T{}) | (narrow(to_f32<F>(s.odd), T{}) << 16));
  } else {
    store<F>(p, s.even);
    store<F>(p + kLanes, s.odd);
  }
}

// The first n columns of a strip; the others are zero and are not written.
template <class F, class T>
LORA_FAST_INLINE Strip<F> load_strip_n(const T* p, int64_t n) {
  if (n >= kStrip) return load_strip<F>(p);
  T part[kStrip];
  std::memset(part, 0, sizeof(part));
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load_strip<F>(part);
}

template <class F, class T>
LORA_FAST_INLINE void store_strip_n(T* p, Strip<F> s, int64_t n) {
  if (n >= kStrip) return store_strip<F>(p, s);
  T part[kStrip];
  store_strip<F>(part, s);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// De-interleaves the two vectors of a strip of F, which hold its columns in order.
template <class V>
LORA_FAST_INLINE void deal_strip(V& first, V& second) {
  const V even =
      __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  second = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  first = even;
}

// The inverse: interleaves them again.
template <class V>
LORA_FAST_INLINE void undeal_strip(V& even, V& odd) {
  const V first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  odd = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  even = first;
}

// Two rows of 32 16-bit elements, column by column in pairs: those of the even columns and those of the odd
// ones.
template <class P>
LORA_FAST_INLINE void store_pairs(u32x16 upper, u32x16 lower, P* even, P* odd) {
  store_bits(even, (upper & 0xffffu) | (lower << 16));
  store_bits(odd, (upper >> 16) | (lower & 0xffff0000u));
}

// out[p] lane l = word p of row l, for sixteen rows of eight 32-bit words: 8 × 8 blocks are transposed by
// exchanging one bit of the row with one bit of the word at a time.
LORA_FAST_INLINE void transpose_words(const void* rows, int64_t row_bytes, u32x16 out[8]) {
  const char* p = static_cast<const char*>(rows);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&out[i], p + i * row_bytes, 32);
    std::memcpy(reinterpret_cast<char*>(&out[i]) + 32, p + (i + 8) * row_bytes, 32);
  }
  const auto exchange = [](u32x16& a, u32x16& b, auto step) LORA_FAST_ALWAYS_INLINE {
    const u32x16 x = a, y = b;
    if constexpr (step == 1) {
      a = __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
      b = __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    } else if constexpr (step == 2) {
      a = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      b = __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    } else {
      a = __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      b = __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  };
  const std::integral_constant<int, 1> one{};
  const std::integral_constant<int, 2> two{};
  const std::integral_constant<int, 4> four{};
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) exchange(out[i], out[i + 1], one);
  exchange(out[0], out[2], two);
  exchange(out[1], out[3], two);
  exchange(out[4], out[6], two);
  exchange(out[5], out[7], two);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) exchange(out[i], out[i + 4], four);
}

// Two vectors from memory that is in the order of the strip already.
template <class F>
LORA_FAST_INLINE Strip<F> load_packed(const F* p) {
  return {load<F>(p), load<F>(p + kLanes)};
}

template <class F>
LORA_FAST_INLINE void store_packed(F* p, Strip<F> s) {
  store<F>(p, s.even);
  store<F>(p + kLanes, s.odd);
}

// The sum of the lanes in double, in pairs, so that an addition waits for three others at most.
template <class F>
LORA_FAST_INLINE double sum_lanes(Vec<F> v) {
  double sums[kLanes];
  store_bits(sums, __builtin_convertvector(v, f64x16));
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

}  // namespace lora_fast
