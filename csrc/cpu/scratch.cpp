#include "scratch.h"

#include <atomic>
#include <new>

namespace lora_fast {
namespace {

constexpr std::align_val_t kAlignment{64};
std::atomic<int64_t> held{0};
std::atomic<int64_t> peak{0};

}  // namespace

ScratchBlock::ScratchBlock(size_t bytes) : data_(::operator new(bytes, kAlignment)), bytes_(bytes) {
  const int64_t now = held.fetch_add(static_cast<int64_t>(bytes)) + static_cast<int64_t>(bytes);
  int64_t seen = peak.load();
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {
  }
}

ScratchBlock::~ScratchBlock() {
  held.fetch_sub(static_cast<int64_t>(bytes_));
  ::operator delete(data_, kAlignment);
}

int64_t scratch_peak_bytes(bool reset) {
  return reset ? peak.exchange(held.load()) : peak.load();
}

}  // namespace lora_fast
