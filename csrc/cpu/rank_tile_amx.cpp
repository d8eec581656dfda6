#include "rank_tile_amx.h"

#if LORA_FAST_HAS_AMX

#include "tiles.h"

namespace lora_fast {
namespace {

// Registers: 0, 1 hold C of the upper and lower 16 rows; 2, 3 and 4, 5 their P, two steps each; 6, 7 hold Q.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

LORA_FAST_AMX void configure(int64_t step) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool holds_p = tile >= 2 && tile <= 5, holds_q = tile >= 6;
    config.rows[tile] = static_cast<uint8_t>(holds_q ? step / 2 : 16);
    config.bytes_per_row[tile] = static_cast<uint16_t>(holds_p ? 2 * step : 64);
  }
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

LORA_FAST_AMX void release() {
  _tile_release();
}

// Up to two steps: P stays in registers over the columns.
template <bool two_rows, bool two_steps>
LORA_FAST_AMX void tile_resident(const bf16* p, const bf16* panel, int64_t step, float* c, int64_t cols) {
  const int64_t depth = two_steps ? 2 * step : step, stride = depth * 2;
  constexpr int64_t c_stride = kTileCols * 4;
  _tile_loadd(2, p, stride);
  if constexpr (two_steps) _tile_loadd(3, p + step, stride);
  if constexpr (two_rows) {
    _tile_loadd(4, p + 16 * depth, stride);
    if constexpr (two_steps) _tile_loadd(5, p + 16 * depth + step, stride);
  }
  for (int64_t j = 0; j < cols; j += 16, panel += depth * 16) {
    _tile_loadd(6, panel, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 2, 6);
    if constexpr (two_rows) {
      _tile_zero(1);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (two_steps) {
      _tile_loadd(7, panel + step * 16, 64);
      _tile_dpbf16ps(0, 3, 7);
      if constexpr (two_rows) _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, c + j, c_stride);
    if constexpr (two_rows) _tile_stored(1, c + 16 * kTileCols + j, c_stride);
  }
}

template <bool two_rows>
LORA_FAST_AMX void tile_streamed(const bf16* p, const bf16* panel, int64_t steps, int64_t step, float* c,
                                 int64_t cols) {
  const int64_t depth = steps * step, stride = depth * 2;
  constexpr int64_t c_stride = kTileCols * 4;
  for (int64_t j = 0; j < cols; j += 16, panel += depth * 16) {
    _tile_zero(0);
    if constexpr (two_rows) _tile_zero(1);
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(6, panel + s * step * 16, 64);
      _tile_loadd(2, p + s * step, stride);
      _tile_dpbf16ps(0, 2, 6);
      if constexpr (two_rows) {
        _tile_loadd(4, p + 16 * depth + s * step, stride);
        _tile_dpbf16ps(1, 4, 6);
      }
    }
    _tile_stored(0, c + j, c_stride);
    if constexpr (two_rows) _tile_stored(1, c + 16 * kTileCols + j, c_stride);
  }
}

}  // namespace

AmxScope::AmxScope(bool active, int64_t step) : active_(active && amx_enabled()) {
  if (active_) configure(step);
}

AmxScope::~AmxScope() {
  if (active_) release();
}

void amx_rank_tile(const bf16* p, const bf16* panel, int64_t steps, int64_t step, float* c, int64_t rows,
                   int64_t cols) {
  const bool two_rows = rows > 16;
  // The tile loads name no memory that they read: what was packed must be in memory by now.
  __asm__ volatile("" : : : "memory");
  if (steps == 1) {
    two_rows ? tile_resident<true, false>(p, panel, step, c, cols)
             : tile_resident<false, false>(p, panel, step, c, cols);
  } else if (steps == 2) {
    two_rows ? tile_resident<true, true>(p, panel, step, c, cols)
             : tile_resident<false, true>(p, panel, step, c, cols);
  } else {
    two_rows ? tile_streamed<true>(p, panel, steps, step, c, cols)
             : tile_streamed<false>(p, panel, steps, step, c, cols);
  }
}

}  // namespace lora_fast

#else

#include <cstdlib>

namespace lora_fast {

// amx_enabled() is false here, so that nothing calls these.
AmxScope::AmxScope(bool active, int64_t) : active_(active) {}
AmxScope::~AmxScope() = default;
void amx_rank_tile(const bf16*, const bf16*, int64_t, int64_t, float*, int64_t, int64_t) {
  std::abort();
}

}  // namespace lora_fast

#endif
