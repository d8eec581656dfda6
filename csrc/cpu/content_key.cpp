// A short key of everything that the norm depends on: all bits of the factors, a sample of W and where it
// lies.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

using Wide = unsigned __int128;

constexpr uint64_t kOdd[4] = {0x9E3779B97F4A7C15u, 0xD1B54A32D192ED03u, 0xABC98388FB8FAC03u,
                              0x8CB92BA72F3D8DD7u};
constexpr int64_t kSamples = 2048;

// Both halves of the 128-bit product: every bit of a and b reaches every bit of the result.
inline uint64_t fold(uint64_t a, uint64_t b) {
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

class Hasher {
 public:
  void add(uint64_t word) { state_[0] = fold(state_[0] ^ word, kOdd[0] ^ state_[1]); }

  void add_bytes(const void* data, size_t bytes) {
    const char* p = static_cast<const char*>(data);
    add(bytes);
    // Four independent chains hide the latency of the multiplication.
    for (; bytes >= 64; bytes -= 64, p += 64) {
      uint64_t words[8];
      std::memcpy(words, p, 64);
      for (int lane = 0; lane < 4; ++lane)
        state_[lane] =
            fold(words[2 * lane] ^ state_[lane], words[2 * lane + 1] ^ kOdd[lane]) + words[2 * lane + 1];
    }
    for (; bytes > 0;) {
      const size_t part = std::min<size_t>(bytes, 8);
      uint64_t word = 0;
      std::memcpy(&word, p, part);
      add(word);
      bytes -= part;
      p += part;
    }
  }

  uint64_t result() const {
    uint64_t hash = kOdd[3];
    for (const uint64_t state : state_) hash = fold(hash ^ state, kOdd[1]) + state;
    return fold(hash ^ (hash >> 32), kOdd[2]);
  }

 private:
  uint64_t state_[4] = {kOdd[0], kOdd[1], kOdd[2], kOdd[3]};
};

uint64_t bits_at(const char* p, size_t width) {
  uint64_t bits = 0;
  switch (width) {
    case 2:
      std::memcpy(&bits, p, 2);
      break;
    case 4:
      std::memcpy(&bits, p, 4);
      break;
    default:
      std::memcpy(&bits, p, 8);
  }
  return bits;
}

void add_matrix(Hasher& hasher, const Tensor& t) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const size_t width = t.element_size();
  if (t.is_contiguous()) {
    hasher.add_bytes(data, static_cast<size_t>(t.numel()) * width);
    return;
  }
  // Along the smaller stride, so that a transposed view reads memory in order.
  const int64_t inner = t.stride(1) <= t.stride(0) ? 1 : 0;
  const int64_t outer_bytes = t.stride(1 - inner) * static_cast<int64_t>(width);
  const int64_t inner_bytes = t.stride(inner) * static_cast<int64_t>(width);
  for (int64_t o = 0; o < t.size(1 - inner); ++o) {
    const char* line = data + o * outer_bytes;
    if (t.stride(inner) == 1) {
      hasher.add_bytes(line, static_cast<size_t>(t.size(inner)) * width);
    } else {
      for (int64_t i = 0; i < t.size(inner); ++i) hasher.add(bits_at(line + i * inner_bytes, width));
    }
  }
}

// Rows in order and evenly, columns by the golden ratio: every stretch of rows and of columns has its share.
void add_sample(Hasher& hasher, const Tensor& w) {
  const int64_t rows = w.size(0), cols = w.size(1);
  if (rows == 0 || cols == 0) return;
  const char* data = static_cast<const char*>(w.const_data_ptr());
  const size_t width = w.element_size();
  const int64_t row_bytes = w.stride(0) * static_cast<int64_t>(width);
  const int64_t col_bytes = w.stride(1) * static_cast<int64_t>(width);
  const bool all = rows * cols <= kSamples;
  const int64_t count = all ? rows * cols : kSamples;
  uint64_t sample[kSamples];
  for (int64_t q = 0; q < count; ++q) {
    const int64_t i =
        all ? q / cols : static_cast<int64_t>(static_cast<Wide>(2 * q + 1) * rows / (2 * kSamples));
    const int64_t j = all ? q % cols : static_cast<int64_t>(static_cast<Wide>(kOdd[0] * q) * cols >> 64);
    sample[q] = bits_at(data + i * row_bytes + j * col_bytes, width);
  }
  hasher.add_bytes(sample, static_cast<size_t>(count) * 8);
}

}  // namespace

Tensor cpu::content_key(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        int64_t version) {
  check_adapter(weight, lora_A, lora_B);
  Hasher factors, sample, form, scale;
  // two threads: the one's time goes to arithmetic, the other's to waiting for memory
  for_chunks(chunk_count(2, 1), 2, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      if (part == 0) {
        add_matrix(factors, lora_A);
        add_matrix(factors, lora_B);
      } else {
        add_sample(sample, weight);
      }
    }
  });
  for (const Tensor* t : {&weight, &lora_A, &lora_B}) {
    form.add(static_cast<uint64_t>(t->scalar_type()));
    for (int64_t d = 0; d < 2; ++d) {
      form.add(static_cast<uint64_t>(t->size(d)));
      form.add(static_cast<uint64_t>(t->stride(d)));
    }
  }
  scale.add_bytes(&scaling, sizeof(scaling));
  scale.add(per_output ? 1 : 0);
  const int64_t size[] = {6};
  Tensor key = torch::stable::new_empty(weight, {size, 1}, ScalarType::Long);
  uint64_t* out = static_cast<uint64_t*>(key.mutable_data_ptr());
  out[0] = factors.result();
  out[1] = sample.result();
  out[2] = reinterpret_cast<uintptr_t>(weight.const_data_ptr());
  out[3] = static_cast<uint64_t>(version);
  out[4] = form.result();
  out[5] = scale.result();
  return key;
}

}  // namespace lora_fast
