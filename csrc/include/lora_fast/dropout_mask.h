// What dropout keeps: a mask that depends on seed, row and column alone, the same on every device.
#pragma once

#include <cmath>

#include "shared.h"

namespace lora_fast {

// murmur3's 32-bit finalizer, with another word between its rounds; Word is uint32_t or a vector of it.
template <class Word>
LORA_FAST_SHARED Word mix(Word z, uint32_t between = 0) {
  z ^= z >> 16;
  z *= 0x85EBCA6Bu;
  z ^= between;
  z ^= z >> 13;
  z *= 0xC2B2AE35u;
  return z ^ (z >> 16);
}

struct RowMask {
  LORA_FAST_SHARED RowMask(uint64_t seed, uint64_t row)
      : first(mix(static_cast<uint32_t>(seed) + static_cast<uint32_t>(row) * 0x9E3779B9u)),
        second(mix(static_cast<uint32_t>(seed >> 32) ^ mix(first + static_cast<uint32_t>(row >> 32)))) {}

  // A column is kept where its word is the threshold or more.
  template <class Word>
  LORA_FAST_SHARED Word word(Word column) const {
    return mix(column + first, second);
  }

  uint32_t first, second;
};

// p < 1
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::floor(p * 4294967296.0));
}

}  // namespace lora_fast
