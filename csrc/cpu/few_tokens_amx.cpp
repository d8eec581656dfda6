#include "few_tokens.h"

#include <cstdlib>

#if LORA_FAST_HAS_AMX

#include "amx_product.h"
#include "tiles.h"

namespace lora_fast {
namespace {

LORA_FAST_INLINE void prefetch_rows(const Ahead<bf16>& ahead, int64_t ld, int64_t k) {
  for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.rows + i * ld + k, 0, 2);
}

// Registers: 0-3 hold C by (rows, tokens); 4, 5 two tiles of W; 6, 7 two of x.
template <bool two_tiles>
LORA_FAST_AMX void forward(const bf16* weight, int64_t ld, const bf16* x, int64_t depth, float* c,
                           int64_t ld_c, Ahead<bf16> ahead) {
  constexpr int64_t tiles = two_tiles ? 2 : 1;
  const int64_t c_stride = ld_c * 4;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two_tiles) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kSmallDepth, x += tiles * kSmallDepth * kTokenTile) {
    prefetch_rows(ahead, ld, k);
    _tile_loadd(6, x, 64);
    _tile_loadd(4, weight + k, ld * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weight + 16 * ld + k, ld * 2);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (two_tiles) {
      _tile_loadd(7, x + kSmallDepth * kTokenTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16 * ld_c, c_stride);
  if constexpr (two_tiles) {
    _tile_stored(2, c + kTokenTile, c_stride);
    _tile_stored(3, c + 16 * ld_c + kTokenTile, c_stride);
  }
}

// Strips that are paired at a time, so that memory is read 256 bytes of a row at a time.
constexpr int64_t kGroup = 4;

// Registers: 0-3 hold C by (tokens, even | odd columns); 4, 5 two tiles of g; 6, 7 the pairs of W.
template <bool two_tiles>
LORA_FAST_AMX void backward(const bf16* g, int64_t ld_g, const bf16* weight, int64_t ld, int64_t strips,
                            float* c) {
  constexpr int64_t c_stride = kStrip * 4, c_size = (two_tiles ? 2 : 1) * kTokenTile * kStrip;
  // two buffers, so that the tile loads do not wait for the stores of the next group
  alignas(64) bf16 pairs[2][kGroup][2][kPanelStep / 2];
  _tile_loadd(4, g, ld_g * 2);
  if constexpr (two_tiles) _tile_loadd(5, g + kTokenTile * ld_g, ld_g * 2);
  pack_pairs(weight, ld, kSmallRows, strips < kGroup ? strips : kGroup, pairs[0][0][0], kPanelStep);
  for (int64_t first = 0, turn = 0; first < strips; first += kGroup, turn ^= 1) {
    const int64_t left = strips - first, next = left - kGroup;
    if (next > 0) {
      pack_pairs(weight + (first + kGroup) * kStrip, ld, kSmallRows, next < kGroup ? next : kGroup,
                 pairs[turn ^ 1][0][0], kPanelStep);
    }
    __asm__ volatile("" : : : "memory");  // the tile loads name no memory that they read
    for (int64_t s = 0; s < (left < kGroup ? left : kGroup); ++s, c += c_size) {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(6, pairs[turn][s][0], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(1, c + kLanes, c_stride);
      _tile_loadd(7, pairs[turn][s][1], 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stored(0, c, c_stride);
      _tile_stored(1, c + kLanes, c_stride);
      if constexpr (two_tiles) {
        float* lower = c + kTokenTile * kStrip;
        _tile_loadd(2, lower, c_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(3, lower + kLanes, c_stride);
        _tile_dpbf16ps(3, 5, 7);
        _tile_stored(2, lower, c_stride);
        _tile_stored(3, lower + kLanes, c_stride);
      }
    }
  }
}

}  // namespace

void tiles_forward(const bf16* weight, int64_t ld, const bf16* x, int64_t tiles, int64_t depth, float* c,
                   int64_t ld_c, Ahead<bf16> ahead) {
  __asm__ volatile("" : : : "memory");
  (tiles == 2 ? forward<true> : forward<false>)(weight, ld, x, depth, c, ld_c, ahead);
  __asm__ volatile("" : : : "memory");
}

void tiles_backward(const bf16* g, int64_t ld_g, const bf16* weight, int64_t ld, int64_t strips,
                    int64_t tiles, float* c) {
  __asm__ volatile("" : : : "memory");
  (tiles == 2 ? backward<true> : backward<false>)(g, ld_g, weight, ld, strips, c);
  __asm__ volatile("" : : : "memory");
}

LORA_FAST_AVX512_BF16 void tiles_squares(const bf16* weight, int64_t ld, int64_t depth, float* sums,
                                         Ahead<bf16> ahead) {
  constexpr int64_t kRows = 4;  // additions need not wait for the ones before them
  constexpr int64_t kGroups = kSmallRows / kRows;
  for (int64_t group = 0; group < kGroups; ++group) {
    const bf16* rows = weight + group * kRows * ld;
    const Ahead<bf16> share{ahead.rows + group * ahead.count / kGroups * ld,
                            (group + 1) * ahead.count / kGroups - group * ahead.count / kGroups};
    f32x16 squares[kRows] = {};
    for (int64_t k = 0; k < depth; k += kSmallDepth) {
      prefetch_rows(share, ld, k);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const auto w = load_bits<u32x16>(rows + r * ld + k);
        squares[r] = add_pair_products(squares[r], w, w);
      }
    }
    for (int64_t r = 0; r < kRows; ++r)
      sums[group * kRows + r] += static_cast<float>(sum_lanes<float>(squares[r]));
  }
}

}  // namespace lora_fast

#else

namespace lora_fast {

// amx_enabled() is false here, so that nothing calls these.
void tiles_forward(const bf16*, int64_t, const bf16*, int64_t, int64_t, float*, int64_t, Ahead<bf16>) {
  std::abort();
}
void tiles_squares(const bf16*, int64_t, int64_t, float*, Ahead<bf16>) {
  std::abort();
}
void tiles_backward(const bf16*, int64_t, const bf16*, int64_t, int64_t, int64_t, float*) {
  std::abort();
}

}  // namespace lora_fast

#endif
