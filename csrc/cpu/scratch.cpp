#include "scratch.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <utility>

namespace lora_fast {
namespace {

constexpr std::align_val_t kAlignment{64};
std::atomic<bool> recording{false};
std::mutex mutex;
std::vector<ScratchEvent> events;

void note(int64_t bytes) {
  if (!recording.load(std::memory_order_relaxed)) return;
  const auto since_1970 = std::chrono::system_clock::now().time_since_epoch();
  const std::lock_guard<std::mutex> lock(mutex);
  events.push_back({std::chrono::duration_cast<std::chrono::nanoseconds>(since_1970).count(), bytes});
}

}  // namespace

ScratchBlock::ScratchBlock(size_t bytes) : data_(::operator new(bytes, kAlignment)), bytes_(bytes) {
  note(static_cast<int64_t>(bytes_));
}

ScratchBlock::~ScratchBlock() {
  note(-static_cast<int64_t>(bytes_));
  ::operator delete(data_, kAlignment);
}

std::vector<ScratchEvent> take_scratch_events(bool record) {
  recording = record;
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(events, {});
}

}  // namespace lora_fast
