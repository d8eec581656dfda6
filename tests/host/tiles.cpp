// Prints what the instructions of csrc/cpu/tiles.h give for numbers of every kind, as bits. The emulation,
// with an argument, makes the mistake of that name first. tests/test_tiles.py compiles it for the processor
// and for the emulation.
#include "tiles.h"

#include <cstdio>
#include <string>

using namespace lora_fast;

namespace {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

// A bfloat16: mostly near 1, where sums round, and at times at either end of the range or of any bits at all.
uint16_t element(int kind) {
  const uint32_t sign = random_bits() & 0x8000u, fraction = random_bits() & 0x7fu;
  if (kind == 0) return sign | ((118 + random_bits() % 16) << 7) | fraction;
  if (kind == 1) return sign | (random_bits() % 70) << 7 | fraction;
  if (kind == 2) return sign | ((180 + random_bits() % 20) << 7) | fraction;
  return static_cast<uint16_t>(random_bits());
}

void print(const float* numbers, int count) {
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof(bits));
    numbers[i] != numbers[i] ? std::puts("nan") : std::printf("%08x\n", bits);
  }
}

// Tiles 0 and 1 of 16 and 5 rows of 16 and 12 floats, and what these are products of.
LORA_FAST_AMX void configure() {
  Config config;
  const int rows[] = {16, 5, 16, 5, 16, 7, 0, 0}, bytes[] = {64, 48, 64, 28, 64, 48, 0, 0};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.bytes_per_row[i] = static_cast<uint16_t>(bytes[i]);
  }
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

LORA_FAST_AMX void products(int kind) {
  alignas(64) uint16_t a[16 * 32], b[16 * 32];
  alignas(64) float c[16 * 16];
  for (auto& x : a) x = element(kind);
  for (auto& x : b) x = element(kind);
  for (auto& x : c) {
    const uint32_t bits = static_cast<uint32_t>(element(kind)) << 16 | (random_bits() & 0xffffu);
    std::memcpy(&x, &bits, sizeof(bits));
  }
  __asm__ volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");
  _tile_loadd(0, c, 64);
  _tile_loadd(2, a, 64);
  _tile_stream_loadd(4, b, 64);
  _tile_dpbf16ps(0, 2, 4);
  _tile_stored(0, c, 64);
  __asm__ volatile("" : : "r"(c) : "memory");
  print(c, 256);
  _tile_zero(1);
  _tile_loadd(3, a, 32);
  _tile_loadd(5, b, 64);
  _tile_dpbf16ps(1, 3, 5);
  _tile_stored(1, c, 48);
  __asm__ volatile("" : : "r"(c) : "memory");
  print(c, 5 * 12);
}

LORA_FAST_AVX512_BF16 void pair_products(int kind) {
  uint32_t a[16], b[16];
  float c[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = static_cast<uint32_t>(element(kind)) << 16 | element(kind);
    b[i] = static_cast<uint32_t>(element(kind)) << 16 | element(kind);
    const uint32_t bits = static_cast<uint32_t>(element(kind)) << 16 | (random_bits() & 0xffffu);
    std::memcpy(c + i, &bits, sizeof(bits));
  }
  store_bits(c, add_pair_products(load_bits<f32x16>(c), load_bits<u32x16>(a), load_bits<u32x16>(b)));
  print(c, 16);
}

#ifdef LORA_FAST_EMULATE_AMX
// The assembler refuses some of these.
void mistake(const std::string& name) {
  if (name == "shapes") _tile_dpbf16ps(0, 2, 5);
  if (name == "twice") _tile_dpbf16ps(0, 2, 2);
  if (name == "unconfigured") _tile_zero(6);
  if (name == "released") {
    _tile_release();
    _tile_zero(0);
  }
  if (name == "configuration") {
    Config config;
    config.rows[0] = 17;
    config.bytes_per_row[0] = 64;
    _tile_loadconfig(&config);
  }
}
#endif

}  // namespace

int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
  if (!amx_enabled()) return 3;
  configure();
#ifdef LORA_FAST_EMULATE_AMX
  if (argc > 1) mistake(argv[1]);
#endif
  for (int i = 0; i < 64; ++i) products(i % 4);
  for (int i = 0; i < 1024; ++i) pair_products(i % 4);
}
