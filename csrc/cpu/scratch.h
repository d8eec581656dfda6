// All working memory of the kernels, counted, so that a test can hold its bound.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_fast {

// A 64-byte aligned block of count elements, uninitialised.
class ScratchBlock {
 public:
  explicit ScratchBlock(size_t bytes);
  ~ScratchBlock();
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

template <class T>
class Scratch : public ScratchBlock {
 public:
  explicit Scratch(int64_t count) : ScratchBlock(static_cast<size_t>(count) * sizeof(T)) {}
  T* data() const { return static_cast<T*>(ScratchBlock::data()); }
};

// The most bytes held at once since the last reset.
int64_t scratch_peak_bytes(bool reset);

}  // namespace lora_fast
