// The gain of an output, wherever a kernel needs it: `factor` itself, or as DoRA's, magnitude / norm.
#pragma once

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

struct Gain {
  const float* factor;  // [N]: gain, or magnitude where there is a norm; null: no gain
  const float* norm;    // [N] or null
};

// n, and infinity where n = 0, as lora_fast/gain.py divides: a norm is positive, zero or NaN.
__device__ inline float divisor(const Gain& gain, int64_t line) {
  const float norm = gain.norm != nullptr ? gain.norm[line] : 1;
  return norm <= 0 ? INFINITY : norm;
}

__device__ inline float gain_at(const Gain& gain, int64_t line) {
  return gain.factor != nullptr ? gain.factor[line] / divisor(gain, line) : 1;
}

}  // namespace lora_fast::cuda
