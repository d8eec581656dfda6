#include "amx_product.h"

#include <cstdlib>
#include <cstring>

namespace lora_fast {

LORA_FAST_CLONES void pack_rows(const bf16* m, int64_t ld, int64_t rows, int64_t steps, RowOrder order,
                                bf16* out) {
  for (int64_t row = 0; row < kPanel; ++row) {
    const int64_t place = order == RowOrder::dealt ? row % 2 * 16 + row / 2 : row;
    bf16* to = out + place * kDepth;
    for (int64_t step = 0; step < steps; ++step, to += kPanelStep) {
      if (row < rows) {
        store_bits(to, load_bits<u32x16>(m + row * ld + step * kDepth));
      } else {
        store_bits(to, u32x16{});
      }
    }
  }
}

LORA_FAST_CLONES void pack_column_tile(const bf16* m, int64_t ld, int64_t rows, int64_t steps, bf16* out,
                                       int64_t out_stride) {
  for (int64_t step = 0; step < steps; ++step, m += kDepth, out += out_stride) {
    alignas(64) bf16 padded[16 * kDepth];
    const bf16* from = m;
    int64_t stride = ld;
    if (rows < 16) {
      std::memset(padded, 0, sizeof(padded));
      for (int64_t i = 0; i < rows; ++i) std::memcpy(padded + i * kDepth, m + i * ld, kDepth * sizeof(bf16));
      from = padded;
      stride = kDepth;
    }
    for (int64_t half = 0; half < 2; ++half) {
      u32x16 words[8];
      transpose_words(from + half * 16, stride * 2, words);
      for (int64_t p = 0; p < 8; ++p) store_bits(out + (half * 8 + p) * kDepth, words[p]);
    }
  }
}

void pack_columns(const bf16* m, int64_t ld, int64_t rows, int64_t steps, bf16* out) {
  for (int64_t tile = 0; tile < 2; ++tile)
    pack_column_tile(m + tile * 16 * ld, ld, rows - tile * 16, steps, out + tile * kPanelStep / 2,
                     kPanelStep);
}

LORA_FAST_CLONES void pack_pairs(const bf16* m, int64_t ld, int64_t rows, int64_t strips, bf16* out,
                                 int64_t out_stride) {
  for (int64_t pair = 0; pair < kDepth / 2; ++pair) {
    const bf16 *upper = m + 2 * pair * ld, *lower = upper + ld;
    for (int64_t strip = 0; strip < strips; ++strip) {
      u32x16 a{}, b{};
      if (2 * pair < rows) a = load_bits<u32x16>(upper + strip * kStrip);
      if (2 * pair + 1 < rows) b = load_bits<u32x16>(lower + strip * kStrip);
      bf16* to = out + strip * out_stride + pair * kDepth;
      store_pairs(a, b, to, to + kPanelStep / 2);
    }
  }
}

#if LORA_FAST_HAS_AMX

}  // namespace lora_fast

#include "tiles.h"

namespace lora_fast {

// Registers: 0-3 hold C by (rows, columns); 4, 5 two tiles of a; 6, 7 two of b.
template <bool stream_a>
LORA_FAST_AMX LORA_FAST_INLINE void multiply(const Panels& panels) {
  const bf16 *a = panels.a, *b = panels.b;
  for (int64_t step = 0; step < panels.steps; ++step, a += kPanelStep, b += kPanelStep) {
    if constexpr (stream_a) {
      _tile_stream_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kPanelStep / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, a + kPanelStep / 2, 64);
    } else {
      _tile_loadd(4, a, 64);
      _tile_stream_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, b + kPanelStep / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kPanelStep / 2, 64);
    }
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

LORA_FAST_AMX void panel_product(Streamed streamed, std::initializer_list<Panels> products, float* c,
                                 bool accumulate) {
  // The tile loads name no memory that they read: what was packed must be in memory by now.
  __asm__ volatile("" : : : "memory");
  if (accumulate) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const Panels& panels : products)
    streamed == Streamed::a ? multiply<true>(panels) : multiply<false>(panels);
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
  __asm__ volatile("" : : : "memory");
}

#else

// amx_enabled() is false here, so that nothing calls this.
void panel_product(Streamed, std::initializer_list<Panels>, float*, bool) {
  std::abort();
}

#endif

}  // namespace lora_fast
