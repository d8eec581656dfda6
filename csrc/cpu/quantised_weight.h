// W[i, j] = value(codes[i, j]) · scale[i, j / block], in float32, rounded once more to W's dtype.
#pragma once

#include <cmath>
#include <limits>

#include "adapted_weight.h"

namespace lora_fast {

using u8x16 = uint8_t __attribute__((vector_size(16)));
using i32x16 = int32_t __attribute__((vector_size(64)));

struct QuantisedWeight : RankUpdate {
  QuantisedWeight(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& levels,
                  ScalarType dtype, const Tensor& lora_A, const Tensor& lora_B, double scaling)
      : RankUpdate(lora_A, lora_B, scaling, false),
        codes(static_cast<const uint8_t*>(codes.const_data_ptr())),
        row_bytes(codes.size(1)),
        scale(static_cast<const float*>(scale.const_data_ptr())),
        row_blocks(scale.size(1)),
        block(cols / row_blocks),
        strips_have_one_scale(block % kStrip == 0 || row_blocks == 1),
        levels(levels ? static_cast<const float*>(levels->const_data_ptr()) : nullptr),
        dtype(dtype) {}

  LORA_FAST_INLINE const uint8_t* row(int64_t i) const { return codes + i * row_bytes; }
  LORA_FAST_INLINE const float* scale_of(int64_t i) const { return scale + i * row_blocks; }

  const uint8_t* codes;
  int64_t row_bytes;
  const float* scale;
  int64_t row_blocks, block;  // columns that share a scale
  bool strips_have_one_scale;
  const float* levels;  // [16] of codes of 4 bits, else null
  ScalarType dtype;
};

// codes uint8 [N, K/2] with levels [16], or int8 [N, K]; scale [N, K / block]
inline void check_quantised(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& levels,
                            const Tensor& lora_A, const Tensor& lora_B) {
  check_matrix(lora_A, "lora_A");
  check_matrix(lora_B, "lora_B");
  check_size(lora_B, "lora_B", 1, lora_A.size(0));
  const int64_t rows = lora_B.size(0), cols = lora_A.size(1);
  STD_TORCH_CHECK(codes.is_cpu() && codes.dim() == 2, "codes must be a CPU tensor of 2 dimensions");
  STD_TORCH_CHECK(codes.scalar_type() == (levels ? ScalarType::Byte : ScalarType::Char),
                  "codes must be uint8 with levels and int8 without, got dtype number ",
                  static_cast<int>(codes.scalar_type()));
  STD_TORCH_CHECK(!levels || cols % 2 == 0, "codes of 4 bits must have rows of whole bytes, got ", cols,
                  " columns");
  check_contiguous(codes, "codes");
  check_size(codes, "codes", 0, rows);
  check_size(codes, "codes", 1, levels ? cols / 2 : cols);
  check_matrix(scale, "scale");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scale must be float32");
  check_contiguous(scale, "scale");
  check_size(scale, "scale", 0, rows);
  STD_TORCH_CHECK(scale.size(1) > 0 && cols % scale.size(1) == 0,
                  "scale must have as many elements a row as divide ", cols, " columns, got ", scale.size(1));
  if (!levels) return;
  check_vector(*levels, "levels", 16);
  STD_TORCH_CHECK(levels->scalar_type() == ScalarType::Float, "levels must be float32");
  check_contiguous(*levels, "levels");
}

// The product as W's dtype holds it.
template <class T>
LORA_FAST_INLINE f32x16 rounded(f32x16 product) {
  if constexpr (sizeof(T) == 2) {
    return widen(narrow(product, T{}), T{});
  } else {
    return product;
  }
}

inline float with_usual_nan(float x) {
  return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x;
}

// The same where a NaN is the usual one, whose bits rounding leaves alone: without a choice by lanes, of
// which GCC makes scalar code for AVX2 and less.
template <class T>
LORA_FAST_INLINE f32x16 rounded_but_nan(f32x16 product) {
  if constexpr (std::is_same_v<T, bf16>) {
    const u32x16 x = (u32x16)product;
    return (f32x16)((x + 0x7fffu + ((x >> 16) & 1u)) & 0xffff0000u);
  } else {
    return rounded<T>(product);
  }
}

// Of 4 bits, the numbers that the codes stand for before they are scaled; of 8 bits zeros.
inline f32x16 levels_of(const QuantisedWeight& w) {
  alignas(64) float levels[kLanes] = {};
  if (w.levels != nullptr) std::transform(w.levels, w.levels + kLanes, levels, with_usual_nan);
  return load<float>(levels);
}

// table[index], of sixteen each, an index being below sixteen: one instruction of AVX-512. With other vectors
// GCC 12 makes scalar code of it: on a Zen 5 23 to 34 ns for a strip, where single loads take 6 to 15.
LORA_FAST_INLINE f32x16 look_up(f32x16 table, u32x16 index) {
#ifndef __clang__
  return __builtin_shuffle(table, index);
#else
  f32x16 found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = table[index[lane]];
  return found;
#endif
}

// The dealt strip of 32 codes of 4 bits, from the sixteen numbers that they can stand for.
LORA_FAST_INLINE Strip<float> look_up_strip(const uint8_t* codes, const float* table) {
  // GCC converts by twice the width, and would take one byte at a time by four times
  const u16x16 pairs = __builtin_convertvector(load_bits<u8x16>(codes), u16x16);
  const u32x16 x = __builtin_convertvector(pairs, u32x16);
  const f32x16 numbers = load<float>(table);
  return {look_up(numbers, x >> 4), look_up(numbers, x & 15u)};
}

// The same in memory, by single loads.
LORA_FAST_INLINE void load_strip_of_codes(const uint8_t* codes, const float* table, float* strip) {
#pragma GCC unroll 16
  for (int64_t l = 0; l < kLanes; ++l) {
    strip[l] = table[codes[l] >> 4];
    strip[kLanes + l] = table[codes[l] & 15];
  }
}

// The dealt strip of 32 int8 codes that share a scale, which comes sixteen times.
template <class T>
LORA_FAST_INLINE Strip<float> scaled_strip(const uint8_t* codes, const float* scales) {
  const f32x16 scale = load<float>(scales);
  const u32x16 x = __builtin_convertvector(load_bits<u16x16>(codes), u32x16);
  const f32x16 even = __builtin_convertvector((i32x16)(x << 24) >> 24, f32x16);
  const f32x16 odd = __builtin_convertvector((i32x16)(x << 16) >> 24, f32x16);
  return {rounded_but_nan<T>(even * scale), rounded_but_nan<T>(odd * scale)};
}

// The dealt strip of row i from column j on, where scales change within it or the row ends: zero past the
// end.
template <class T, bool four_bits>
LORA_FAST_INLINE Strip<float> strip_by_elements(const QuantisedWeight& w, int64_t i, int64_t j) {
  const uint8_t* row = w.row(i);
  const float* scale = w.scale_of(i) + j / w.block;
  int64_t left = w.block - j % w.block;  // of the scale's block
  float products[kStrip] = {};
  for (int64_t c = 0; c < std::min(kStrip, w.cols - j); ++c, --left) {
    if (left == 0) {
      ++scale;
      left = w.block;
    }
    float value;
    if constexpr (four_bits) {
      const uint8_t pair = row[(j + c) / 2];
      value = w.levels[(j + c) % 2 == 0 ? pair >> 4 : pair & 15];
    } else {
      value = static_cast<float>(static_cast<int8_t>(row[j + c]));
    }
    products[dealt_position(c)] = value * *scale;
  }
  const Strip<float> x = load_packed(products);
  return {rounded<T>(x.even), rounded<T>(x.odd)};
}

}  // namespace lora_fast
