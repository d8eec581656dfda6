// The key of a kept norm, as lora_fast/content_key.py defines it.
#pragma once

#include <cstdint>
#include <optional>

#include "../checks.h"
#include "../include/lora_fast/content_hash.h"

namespace lora_fast {

struct ContentKey {
  uint64_t factors, sample, host;
};
static_assert(sizeof(ContentKey) == kKeyLength * sizeof(int64_t));

// The sample is left 0.
ContentKey key_without_sample(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                              double scaling, bool per_output, int64_t version);

// The sample of the rows [begin, end) of a matrix, W or the `index`-th of those that make it up: the samples
// of disjoint rows add up.
uint64_t sample_of_rows(const Tensor& matrix, int64_t begin, int64_t end, int64_t index = 0);

// Copies the kept norm if its key is `key` but for the sample, and returns the kept sample.
std::optional<uint64_t> load_kept_norm_but_for_sample(const Tensor& kept_norm, const Tensor& kept_key,
                                                      const ContentKey& key, Tensor& norm);
void keep_norm_of(Tensor& kept_norm, Tensor& kept_key, const ContentKey& key, const Tensor& norm);

}  // namespace lora_fast
