// One strip of out = gain ⊙ v + bias with v = base + s c, product = v.
#pragma once

#include "rank_tile.h"

namespace lora_fast {

// c, gain and bias in the order of strips, or null; the first n columns are written.
template <class F, class T>
LORA_FAST_INLINE void compose_strip(const T* base, T* out, T* product, const F* c, Vec<F> scaling,
                                    const F* gain, const F* bias, int64_t n) {
  Strip<F> v = load_strip_n<F>(base, n);
  if (c != nullptr) {
    const Strip<F> update = load_packed(c);
    v = {v.even + scaling * update.even, v.odd + scaling * update.odd};
  }
  if (product != nullptr) store_strip_n<F>(product, v, n);
  if (gain != nullptr) {
    const Strip<F> g = load_packed(gain);
    v = {v.even * g.even, v.odd * g.odd};
  }
  if (bias != nullptr) {
    const Strip<F> b = load_packed(bias);
    v = {v.even + b.even, v.odd + b.odd};
  }
  store_strip_n<F>(out, v, n);
}

}  // namespace lora_fast
