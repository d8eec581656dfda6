#include "content_key.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

using Wide = unsigned __int128;

constexpr uint64_t kOdd[4] = {0x9E3779B97F4A7C15u, 0xD1B54A32D192ED03u, 0xABC98388FB8FAC03u,
                              0x8CB92BA72F3D8DD7u};
constexpr int64_t kSamples = 2048;
constexpr int64_t kParts = 16;        // hashed by themselves, whatever the number of threads
constexpr int64_t kGrain = 64 << 10;  // bytes to be read that are worth a thread
constexpr int64_t kLine = 64;         // bytes

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

// The part-th of kParts stretches of a range.
struct Stretch {
  Stretch(int64_t count, int64_t part) : begin(count * part / kParts), end(count * (part + 1) / kParts) {}
  int64_t begin, end;
};

void add_matrix(Hasher& hasher, const Tensor& t, int64_t part) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t width = static_cast<int64_t>(t.element_size());
  if (t.is_contiguous()) {
    const Stretch elements(t.numel(), part);
    hasher.add_bytes(data + elements.begin * width,
                     static_cast<size_t>((elements.end - elements.begin) * width));
    return;
  }
  // Along the smaller stride, so that a transposed view reads memory in order.
  const int64_t inner = t.stride(1) <= t.stride(0) ? 1 : 0;
  const int64_t outer_bytes = t.stride(1 - inner) * width;
  const int64_t inner_bytes = t.stride(inner) * width;
  const Stretch lines(t.size(1 - inner), part);
  for (int64_t o = lines.begin; o < lines.end; ++o) {
    const char* line = data + o * outer_bytes;
    if (t.stride(inner) == 1) {
      hasher.add_bytes(line, static_cast<size_t>(t.size(inner) * width));
    } else {
      for (int64_t i = 0; i < t.size(inner); ++i)
        hasher.add(bits_at(line + i * inner_bytes, static_cast<size_t>(width)));
    }
  }
}

// Which elements of a matrix are sampled: rows in order and evenly, columns by the golden ratio, so that
// every stretch of rows and of columns has its share.
class Sampling {
 public:
  Sampling(int64_t rows, int64_t cols) : rows_(rows), cols_(cols), all_(rows * cols <= kSamples) {}
  int64_t row(int64_t q) const {
    return all_ ? q / cols_ : static_cast<int64_t>(static_cast<Wide>(2 * q + 1) * rows_ / (2 * kSamples));
  }
  int64_t col(int64_t q) const {
    return all_ ? q % cols_ : static_cast<int64_t>(static_cast<Wide>(kOdd[0] * q) * cols_ >> 64);
  }
  // the first q of the row or of those behind it
  int64_t first_of(int64_t row) const {
    if (all_) return row * cols_;
    const Wide twice = static_cast<Wide>(2 * kSamples) * row;
    return twice <= static_cast<Wide>(rows_) ? 0 : static_cast<int64_t>((twice + rows_ - 1) / (2 * rows_));
  }

 private:
  int64_t rows_, cols_;
  bool all_;
};

// f(part) for every part. Each thread has its share of what waits for memory.
template <class F>
void for_parts(int64_t bytes, const F& f) {
  for_chunks(std::min(chunk_count(bytes, kGrain), kParts), kParts, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

uint64_t sample_of(const Tensor& weight) {
  uint64_t parts[kParts];
  for_parts(kSamples * kLine, [&](int64_t part) {
    const Stretch rows(weight.size(0), part);
    parts[part] = sample_of_rows(weight, rows.begin, rows.end);
  });
  return std::accumulate(parts, parts + kParts, uint64_t{0});
}

}  // namespace

uint64_t sample_of_rows(const Tensor& weight, int64_t begin, int64_t end) {
  const Sampling sampling(weight.size(0), weight.size(1));
  if (weight.numel() == 0) return 0;
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  const size_t width = weight.element_size();
  const int64_t row_bytes = weight.stride(0) * static_cast<int64_t>(width);
  const int64_t col_bytes = weight.stride(1) * static_cast<int64_t>(width);
  uint64_t sum = 0;
  for (int64_t q = sampling.first_of(begin), last = sampling.first_of(end); q < last; ++q) {
    const uint64_t bits = bits_at(data + sampling.row(q) * row_bytes + sampling.col(q) * col_bytes, width);
    sum += fold(bits ^ kOdd[1], (kOdd[2] + static_cast<uint64_t>(q) * kOdd[3]) | 1);
  }
  return sum;
}

ContentKey key_without_sample(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                              double scaling, bool per_output, int64_t version) {
  uint64_t parts[kParts];
  for_parts((lora_A.numel() + lora_B.numel()) * static_cast<int64_t>(lora_A.element_size()),
            [&](int64_t part) {
              Hasher hasher;
              add_matrix(hasher, lora_A, part);
              add_matrix(hasher, lora_B, part);
              parts[part] = hasher.result();
            });
  Hasher factors, form, scale;
  factors.add_bytes(parts, sizeof(parts));
  for (const Tensor* t : {&weight, &lora_A, &lora_B}) {
    form.add(static_cast<uint64_t>(t->scalar_type()));
    for (int64_t d = 0; d < 2; ++d) {
      form.add(static_cast<uint64_t>(t->size(d)));
      form.add(static_cast<uint64_t>(t->stride(d)));
    }
  }
  scale.add_bytes(&scaling, sizeof(scaling));
  scale.add(per_output ? 1 : 0);
  return {factors.result(),
          0,
          reinterpret_cast<uintptr_t>(weight.const_data_ptr()),
          static_cast<uint64_t>(version),
          form.result(),
          scale.result()};
}

Tensor cpu::content_key(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        int64_t version) {
  check_adapter(weight, lora_A, lora_B);
  ContentKey key = key_without_sample(weight, lora_A, lora_B, scaling, per_output, version);
  key.sample = sample_of(weight);
  const int64_t size[] = {sizeof(key) / sizeof(int64_t)};
  Tensor out = torch::stable::new_empty(weight, {size, 1}, ScalarType::Long);
  std::memcpy(out.mutable_data_ptr(), &key, sizeof(key));
  return out;
}

}  // namespace lora_fast
