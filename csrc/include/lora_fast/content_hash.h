// The arithmetic of a kept norm's key; lora_fast/content_key.py is its definition.
#pragma once

#include "shared.h"

namespace lora_fast {

constexpr int kKeyLength = 3, kKeyHashes = 2;  // [factors, sample, host], and those of the content
constexpr int64_t kKeySamples = 2048;
constexpr uint64_t kLowOdd = 0x9E3779B97F4A7C15u, kHighOdd = 0xD1B54A32D192ED03u;
constexpr uint64_t kLoneHigh = 0x8CB92BA72F3D8DD7u;  // beside a number that is a word by itself
constexpr int64_t kWordBytes = 16;
constexpr uint64_t kLoraBPosition = uint64_t{1} << 48;

// Both halves of the 128-bit product: every bit of a and b reaches every bit of the result.
LORA_FAST_SHARED uint64_t fold(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return a * b ^ __umul64hi(a, b);
#else
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#endif
}

LORA_FAST_SHARED uint64_t hash_word(uint64_t low, uint64_t high, uint64_t position) {
  return fold(low ^ (2 * position + 1) * kLowOdd, high ^ (2 * position + 1) * kHighOdd);
}

// The sampled elements of a matrix: rows in order and evenly, columns by the golden ratio.
struct Sampling {
  LORA_FAST_SHARED Sampling(int64_t row_count, int64_t col_count)
      : rows(row_count), cols(col_count), all(row_count * col_count <= kKeySamples) {}
  LORA_FAST_SHARED int64_t count() const { return all ? rows * cols : kKeySamples; }
  LORA_FAST_SHARED int64_t row(int64_t q) const {
    return all ? q / cols : (2 * q + 1) * rows / (2 * kKeySamples);
  }
  LORA_FAST_SHARED int64_t col(int64_t q) const {
    return all ? q % cols : (q * 0x9E3779B1 & 0xFFFFFFFF) * cols >> 32;
  }
  // the first q of the row or of those behind it
  LORA_FAST_SHARED int64_t first_of(int64_t row) const {
    return all ? row * cols : (2 * kKeySamples * row + rows - 1) / (2 * rows);
  }

  int64_t rows, cols;
  bool all;
};

}  // namespace lora_fast
