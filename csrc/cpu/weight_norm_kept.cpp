// The kept norm while nothing that it depends on has changed (law 3 of docs/design.md).
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <mutex>

#include "content_key.h"
#include "ops.h"

namespace lora_fast {
namespace {

size_t bytes_of(const Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.element_size();
}

// The kept norm and its key are one thing to other threads; the norm is written before its key.
std::mutex mutex;

void check_kept(const Tensor& kept_norm, const Tensor& kept_key, const Tensor& norm) {
  check_wide(kept_norm, "kept_norm", norm.size(0));
  check_contiguous(kept_norm, "kept_norm");
  STD_TORCH_CHECK(kept_norm.scalar_type() == norm.scalar_type(), "kept_norm must have the norm's dtype");
  STD_TORCH_CHECK(kept_key.scalar_type() == ScalarType::Long && kept_key.is_contiguous() &&
                      kept_key.numel() == kKeyLength,
                  "kept_key must be contiguous int64 of size ", kKeyLength);
}

ContentKey content_of(const Tensor& key) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.is_contiguous() && key.numel() == kKeyLength,
                  "key must be contiguous int64 of size ", kKeyLength);
  ContentKey content;
  std::memcpy(&content, key.const_data_ptr(), sizeof(content));
  return content;
}

}  // namespace

std::optional<uint64_t> load_kept_norm_but_for_sample(const Tensor& kept_norm, const Tensor& kept_key,
                                                      const ContentKey& key, Tensor& norm) {
  check_kept(kept_norm, kept_key, norm);
  const std::lock_guard<std::mutex> lock(mutex);
  const ContentKey kept = content_of(kept_key);
  ContentKey compared = kept;
  compared.sample = key.sample;
  if (std::memcmp(&compared, &key, sizeof(key)) != 0) return std::nullopt;
  std::memcpy(norm.mutable_data_ptr(), kept_norm.const_data_ptr(), bytes_of(norm));
  return kept.sample;
}

void keep_norm_of(Tensor& kept_norm, Tensor& kept_key, const ContentKey& key, const Tensor& norm) {
  check_kept(kept_norm, kept_key, norm);
  const std::lock_guard<std::mutex> lock(mutex);
  std::memcpy(kept_norm.mutable_data_ptr(), norm.const_data_ptr(), bytes_of(norm));
  std::memcpy(kept_key.mutable_data_ptr(), &key, sizeof(key));
}

bool cpu::load_kept_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor norm) {
  const ContentKey content = content_of(key);
  return load_kept_norm_but_for_sample(kept_norm, kept_key, content, norm) == content.sample;
}

void cpu::keep_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor norm) {
  keep_norm_of(kept_norm, kept_key, content_of(key), norm);
}

Tensor cpu::weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                             Tensor kept_norm, Tensor kept_key, int64_t version) {
  const Tensor key = content_key(weight, lora_A, lora_B, scaling, per_output, version);
  check_wide(kept_norm, "kept_norm", weight.size(per_output ? 0 : 1));
  Tensor norm = torch::stable::new_empty(kept_norm, kept_norm.sizes());
  if (load_kept_norm(kept_norm, kept_key, key, norm)) return norm;
  norm = weight_norm_fwd(weight, lora_A, lora_B, scaling, per_output);
  keep_norm(kept_norm, kept_key, key, norm);
  return norm;
}

}  // namespace lora_fast
