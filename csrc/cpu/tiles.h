// The instructions that the AMX sources use: the processor's own, or with LORA_FAST_EMULATE_AMX the tests'
// emulation (tests/host/emulated_tiles.h). It is included instead of <immintrin.h>, by .cpp files only.
#pragma once

#include "vec.h"

#if LORA_FAST_HAS_AMX && !defined(LORA_FAST_EMULATE_AMX)

#include <immintrin.h>

// What a function needs that uses the tiles; every processor with AMX has these vectors.
#define LORA_FAST_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw")))
// What a function needs that uses add_pair_products; every processor with AVX512-BF16 has the others, and one
// with AMX that lacks it counts as one without.
#define LORA_FAST_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace lora_fast {

// sums[i] += a[2i + 1] b[2i + 1], then += a[2i] b[2i], of bfloat16
LORA_FAST_AVX512_BF16 LORA_FAST_INLINE f32x16 add_pair_products(f32x16 sums, u32x16 a, u32x16 b) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

}  // namespace lora_fast

#elif defined(LORA_FAST_EMULATE_AMX)

#include "emulated_tiles.h"

#endif
