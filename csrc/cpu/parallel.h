// Chunks of a range over torch's threads; the split depends on the range and the thread count alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace lora_fast {

// At most one chunk per thread and none smaller than grain, except the only one.
inline int64_t chunk_count(int64_t count, int64_t grain) {
  if (count < 2 * grain) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), count / grain);
}

// f(chunk, begin, end); a single chunk runs here, without waking a thread.
template <class F>
void for_chunks(int64_t chunks, int64_t count, const F& f) {
  if (chunks == 1) {
    f(int64_t{0}, int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c, count * c / chunks, count * (c + 1) / chunks);
  });
}

}  // namespace lora_fast
