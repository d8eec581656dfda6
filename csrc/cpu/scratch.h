// All working memory of the kernels; recorded on demand, so that a test can hold its bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// A block taken (bytes > 0) or given back, and when: nanoseconds since 1970, the clock of PyTorch's profiler.
struct ScratchEvent {
  int64_t time, bytes;
};

// The events recorded since the last call; from now on they are recorded or not.
std::vector<ScratchEvent> take_scratch_events(bool record);

}  // namespace lora_fast
