#include "amx_parts.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace lora_fast {
namespace {

using u16x32 = uint16_t __attribute__((vector_size(64)));

// To bfloat16, in the upper half of each lane.
LORA_FAST_INLINE u32x16 rounded(f32x16 x) {
  return ((u32x16)x + 0x8000u) & 0xffff0000u;
}

// The parts of sixteen elements, each in the upper half of its lane.
struct Parts {
  u32x16 part[kParts];
};

LORA_FAST_INLINE Parts split(f32x16 x) {
  const u32x16 first = rounded(x);
  const f32x16 rest = x - (f32x16)first;
  const u32x16 second = rounded(rest);
  return {{first, second, (u32x16)(rest - (f32x16)second)}};
}

LORA_FAST_INLINE u32x16 larger(u32x16 largest, f32x16 x) {
  const u32x16 magnitude = (u32x16)x & 0x7fffffffu;
  return magnitude > largest ? magnitude : largest;
}

LORA_FAST_INLINE uint32_t largest_lane(u32x16 v) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kLanes; ++i) largest = std::max<uint32_t>(largest, v[i]);
  return largest;
}

// The parts of 32 adjacent elements, part p at out + p · part_stride.
LORA_FAST_INLINE u32x16 split_line(const float* m, bf16* out, int64_t part_stride, u32x16 largest) {
  const f32x16 low = load<float>(m), high = load<float>(m + kLanes);
  const Parts low_parts = split(low), high_parts = split(high);
#pragma GCC unroll 3
  for (int64_t p = 0; p < kParts; ++p) {
    const u16x32 upper_halves = __builtin_shufflevector(
        (u16x32)low_parts.part[p], (u16x32)high_parts.part[p], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25,
        27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
    store_bits(out + p * part_stride, upper_halves);
  }
  return larger(larger(largest, low), high);
}

}  // namespace

LORA_FAST_CLONES uint32_t split_rows(const float* m, int64_t ld, int64_t rows, int64_t steps, bf16* out) {
  u32x16 largest{};
  for (int64_t row = 0; row < kPanel; ++row, out += kDepth) {
    for (int64_t step = 0; step < steps; ++step) {
      bf16* to = out + step * kPartsStep;
      if (row < rows) {
        largest = split_line(m + row * ld + step * kDepth, to, kPanelStep, largest);
      } else {
        for (int64_t p = 0; p < kParts; ++p) std::memset(to + p * kPanelStep, 0, kDepth * sizeof(bf16));
      }
    }
  }
  return largest_lane(largest);
}

LORA_FAST_CLONES uint32_t split_columns(const float* m, int64_t ld, int64_t rows, int64_t steps, bf16* out) {
  constexpr int64_t kTile = 16, kTileSize = kTile * kDepth;
  u32x16 largest{};
  alignas(64) bf16 lines[kParts * kTileSize];
  for (int64_t step = 0; step < steps; ++step, m += kDepth, out += kPartsStep) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t row = tile * kTile + i;
        if (row < rows) {
          largest = split_line(m + row * ld, lines + i * kDepth, kTileSize, largest);
        } else {
          for (int64_t p = 0; p < kParts; ++p)
            std::memset(lines + p * kTileSize + i * kDepth, 0, kDepth * sizeof(bf16));
        }
      }
      for (int64_t p = 0; p < kParts; ++p) {
        bf16* to = out + p * kPanelStep + tile * kTileSize;
        for (int64_t half = 0; half < 2; ++half) {
          u32x16 words[8];
          transpose_words(lines + p * kTileSize + half * 16, kDepth * sizeof(bf16), words);
          for (int64_t pair = 0; pair < 8; ++pair) store_bits(to + (half * 8 + pair) * kDepth, words[pair]);
        }
      }
    }
  }
  return largest_lane(largest);
}

LORA_FAST_CLONES uint32_t split_pairs(const float* m, int64_t ld, int64_t steps, bf16* out) {
  u32x16 largest{};
  for (int64_t pair = 0; pair < steps * kDepth / 2; ++pair) {
    const float *upper = m + 2 * pair * ld, *lower = upper + ld;
    bf16* to = out + pair / (kDepth / 2) * kPartsStep + pair % (kDepth / 2) * kDepth;
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const f32x16 a = load<float>(upper + half * kLanes), b = load<float>(lower + half * kLanes);
      const Parts first = split(a), second = split(b);
#pragma GCC unroll 3
      for (int64_t p = 0; p < kParts; ++p)
        store_bits(to + p * kPanelStep + half * (kPanelStep / 2),
                   (first.part[p] >> 16) | (second.part[p] & 0xffff0000u));
      largest = larger(larger(largest, a), b);
    }
  }
  return largest_lane(largest);
}

#if LORA_FAST_HAS_AMX

}  // namespace lora_fast

#include "tiles.h"

namespace lora_fast {

// Registers: 0-3 hold C by (rows, columns); 4, 5 two tiles of a; 6, 7 two of b. The order needs the fewest
// loads: one operand changes at a time.
LORA_FAST_AMX void parts_product(const bf16* a, const bf16* b, int64_t steps, float* c) {
  constexpr int64_t kTile = kPanelStep / 2;
  // The tile loads name no memory that they read: what was packed must be in memory by now.
  __asm__ volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, a += kPartsStep, b += kPartsStep) {
    const bf16 *a2 = a + kPanelStep, *a3 = a2 + kPanelStep, *b2 = b + kPanelStep, *b3 = b2 + kPanelStep;
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a3, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a3 + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a2 + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b2 + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b3, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b3 + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
  __asm__ volatile("" : : : "memory");
}

#else

// amx_enabled() is false here, so that nothing calls this.
void parts_product(const bf16*, const bf16*, int64_t, float*) {
  std::abort();
}

#endif

}  // namespace lora_fast
