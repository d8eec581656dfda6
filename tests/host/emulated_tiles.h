// What csrc/cpu/tiles.h gives, in plain C++ that gives the same bits as the processor's instructions, so that
// the tests run the AMX sources on every processor (.ci/portable). tiles.h includes it, behind vec.h.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#define LORA_FAST_AMX
#define LORA_FAST_AVX512_BF16

namespace lora_fast {

constexpr int kTiles = 8, kMaxTileRows = 16, kMaxTileBytes = 64;

struct Tile {
  int rows, bytes_per_row;  // 0 where the tile is not configured
  alignas(64) uint8_t data[kMaxTileRows][kMaxTileBytes];
};

inline thread_local Tile tile_registers[kTiles];

// Where the processor would raise an exception.
[[noreturn]] inline void tile_fault(const char* instruction, const char* reason) {
  std::fprintf(stderr, "emulated AMX: %s: %s\n", instruction, reason);
  std::abort();
}

inline Tile& configured_tile(int number, const char* instruction) {
  if (number < 0 || number >= kTiles) tile_fault(instruction, "there is no such tile");
  if (tile_registers[number].rows == 0) tile_fault(instruction, "a tile is not configured");
  return tile_registers[number];
}

inline void _tile_release() {
  std::memset(tile_registers, 0, sizeof(tile_registers));
}

inline void _tile_loadconfig(const void* memory) {
  const auto* config = static_cast<const uint8_t*>(memory);
  if (config[0] != 1) tile_fault("ldtilecfg", "the palette is not 1");
  if (config[1] != 0) tile_fault("ldtilecfg", "the row to start at is not 0");
  _tile_release();
  for (int i = 0; i < kMaxTileRows; ++i) {
    uint16_t bytes_per_row = 0;
    std::memcpy(&bytes_per_row, config + 16 + 2 * i, sizeof(bytes_per_row));
    const uint8_t rows = config[48 + i];
    if (rows > kMaxTileRows || bytes_per_row > kMaxTileBytes || (rows == 0) != (bytes_per_row == 0) ||
        (i >= kTiles && rows != 0))
      tile_fault("ldtilecfg", "a tile has no valid shape");
    if (i >= kTiles) continue;
    tile_registers[i].rows = rows;
    tile_registers[i].bytes_per_row = bytes_per_row;
  }
}

inline void _tile_zero(int number) {
  Tile& tile = configured_tile(number, "tilezero");
  std::memset(tile.data, 0, sizeof(tile.data));
}

inline void _tile_loadd(int number, const void* memory, int64_t stride) {
  Tile& tile = configured_tile(number, "tileloadd");
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.data[row], static_cast<const uint8_t*>(memory) + row * stride, tile.bytes_per_row);
}

inline void _tile_stream_loadd(int number, const void* memory, int64_t stride) {
  _tile_loadd(number, memory, stride);
}

inline void _tile_stored(int number, void* memory, int64_t stride) {
  const Tile& tile = configured_tile(number, "tilestored");
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<uint8_t*>(memory) + row * stride, tile.data[row], tile.bytes_per_row);
}

// Denormal numbers count as zero and become zero, whatever the thread's own mode is.
LORA_FAST_INLINE float flushed(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

LORA_FAST_INLINE float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return flushed(bits);
}

LORA_FAST_INLINE float fused(float a, float b, float sum) {
  return flushed(__builtin_fmaf(a, b, sum));
}

inline uint32_t pair_at(const uint8_t* row, int i) {
  uint32_t pair;
  std::memcpy(&pair, row + 4 * i, sizeof(pair));
  return pair;
}

// As Intel's manual writes it: the products of the even elements and those of the odd ones are summed apart,
// and their sums are added, and then added to what was there.
inline void _tile_dpbf16ps(int to, int left, int right) {
  constexpr const char* kName = "tdpbf16ps";
  if (to == left || to == right || left == right) tile_fault(kName, "a tile is named twice");
  Tile& c = configured_tile(to, kName);
  const Tile &a = configured_tile(left, kName), &b = configured_tile(right, kName);
  if (c.rows != a.rows || c.bytes_per_row != b.bytes_per_row || a.bytes_per_row != 4 * b.rows)
    tile_fault(kName, "the shapes do not match");
  constexpr int kWords = kMaxTileBytes / 4;
  float factors[kMaxTileRows][2 * kWords];  // of b, the even elements of a row before the odd ones
  for (int k = 0; k < b.rows; ++k) {
    for (int n = 0; n < kWords; ++n) {
      const uint32_t pair = pair_at(b.data[k], n);
      factors[k][n] = flushed(pair << 16);
      factors[k][kWords + n] = flushed(pair & 0xffff0000u);
    }
  }
  for (int row = 0; row < c.rows; ++row) {
    float apart[2 * kWords] = {}, element[2 * kWords], sums[kWords];
    for (int k = 0; k < b.rows; ++k) {
      const uint32_t pair = pair_at(a.data[row], k);
      std::fill_n(element, kWords, flushed(pair << 16));
      std::fill_n(element + kWords, kWords, flushed(pair & 0xffff0000u));
      for (int i = 0; i < 2 * kWords; ++i) apart[i] = fused(element[i], factors[k][i], apart[i]);
    }
    std::memcpy(sums, c.data[row], sizeof(sums));
    for (int n = 0; n < kWords; ++n)
      sums[n] = flushed(flushed(sums[n]) + flushed(apart[n] + apart[kWords + n]));
    std::memcpy(c.data[row], sums, c.bytes_per_row);
  }
}

LORA_FAST_INLINE f32x16 add_pair_products(f32x16 sums, u32x16 a, u32x16 b) {
  for (int i = 0; i < kLanes; ++i) {
    const float odd = fused(flushed(a[i] & 0xffff0000u), flushed(b[i] & 0xffff0000u), flushed(sums[i]));
    sums[i] = fused(flushed(a[i] << 16), flushed(b[i] << 16), odd);
  }
  return sums;
}

}  // namespace lora_fast
