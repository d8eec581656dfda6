#include "content_key.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../host_key.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

constexpr int64_t kGrain = 64 << 10;  // bytes to be read that are worth a thread
constexpr int64_t kLine = 64;         // bytes
constexpr int64_t kShares = 16;       // of the words and of each matrix's rows, that threads divide

template <class Bits>
uint64_t load_bits(const char* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

uint64_t bits_at(const char* p, int64_t width) {
  return width == 1   ? load_bits<uint8_t>(p)
         : width == 2 ? load_bits<uint16_t>(p)
         : width == 4 ? load_bits<uint32_t>(p)
                      : load_bits<uint64_t>(p);
}

// Words that lie one after another, at positions from `position` on.
uint64_t hash_words(const char* words, int64_t count, uint64_t position) {
  uint64_t low_odd = (2 * position + 1) * kLowOdd, high_odd = (2 * position + 1) * kHighOdd, sum = 0;
  for (const char* end = words + count * kWordBytes; words != end; words += kWordBytes) {
    sum += fold(load_bits<uint64_t>(words) ^ low_odd, load_bits<uint64_t>(words + 8) ^ high_odd);
    low_odd += 2 * kLowOdd;
    high_odd += 2 * kHighOdd;
  }
  return sum;
}

template <class Bits>
void copy_elements(const char* from, int64_t stride, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * sizeof(Bits), from + i * stride, sizeof(Bits));
}

// A factor's elements, in the order in which they make words.
class FactorBits {
 public:
  explicit FactorBits(const Tensor& t)
      : data_(static_cast<const char*>(t.const_data_ptr())),
        width_(static_cast<int64_t>(t.element_size())),
        count_(t.numel()) {
    const int64_t outer = t.stride(0) < t.stride(1) ? 1 : 0;
    length_ = t.size(1 - outer);
    outer_stride_ = t.stride(outer) * width_;
    inner_stride_ = t.stride(1 - outer) * width_;
  }

  int64_t words() const { return (count_ * width_ + kWordBytes - 1) / kWordBytes; }

  // The share of the words [begin, end).
  uint64_t hash(int64_t begin, int64_t end, uint64_t position) const {
    const bool adjacent = inner_stride_ == width_ && outer_stride_ == length_ * width_;
    if (adjacent && count_ * width_ % kWordBytes == 0)
      return hash_words(data_ + begin * kWordBytes, end - begin, position + begin);
    constexpr int64_t kGathered = 256;  // words
    char gathered[kGathered * kWordBytes];
    const int64_t elements = kWordBytes / width_;
    uint64_t sum = 0;
    for (; begin < end; begin += kGathered) {
      const int64_t words = std::min(kGathered, end - begin);
      std::memset(gathered + (words - 1) * kWordBytes, 0, kWordBytes);
      gather(begin * elements, std::min(count_, (begin + words) * elements), gathered);
      sum += hash_words(gathered, words, position + begin);
    }
    return sum;
  }

 private:
  // Copies the elements [begin, end).
  void gather(int64_t begin, int64_t end, char* to) const {
    while (begin < end) {
      const int64_t at = begin % length_, count = std::min(end - begin, length_ - at);
      const char* from = data_ + begin / length_ * outer_stride_ + at * inner_stride_;
      if (inner_stride_ == width_) {
        std::memcpy(to, from, static_cast<size_t>(count * width_));
      } else {
        const auto copy = width_ == 2   ? copy_elements<uint16_t>
                          : width_ == 4 ? copy_elements<uint32_t>
                                        : copy_elements<uint64_t>;
        copy(from, inner_stride_, count, to);
      }
      to += count * width_;
      begin += count;
    }
  }

  const char* data_;
  int64_t width_, count_, length_, outer_stride_, inner_stride_;  // strides in bytes
};

// The hashes of the factors' words and the samples of some matrices. Each thread has its share of what waits
// for memory.
class Hashes {
 public:
  Hashes(const Tensor& lora_A, const Tensor& lora_B) : a_(lora_A), b_(lora_B) {}

  // {factors, sample}
  std::pair<uint64_t, uint64_t> of(const Tensor* matrices, int64_t count) const {
    std::atomic<uint64_t> factors = 0, sample = 0;
    int64_t bytes = words() * kWordBytes;
    for (int64_t m = 0; m < count; ++m) bytes += std::min(kKeySamples, matrices[m].numel()) * kLine;
    for_chunks(chunk_count(bytes, kGrain), kShares, [&](int64_t, int64_t begin, int64_t end) {
      factors += factors_of(words() * begin / kShares, words() * end / kShares);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t rows = matrices[m].size(0);
        sample += sample_of_rows(matrices[m], rows * begin / kShares, rows * end / kShares, m);
      }
    });
    return {factors, sample};
  }

 private:
  int64_t words() const { return a_.words() + b_.words(); }

  // of the words [begin, end), lora_A's and behind them lora_B's
  uint64_t factors_of(int64_t begin, int64_t end) const {
    const int64_t split = a_.words();
    return a_.hash(std::min(begin, split), std::min(end, split), 0) +
           b_.hash(std::max(begin, split) - split, std::max(end, split) - split, kLoraBPosition);
  }

  const FactorBits a_, b_;
};

Tensor key_on(const Tensor& like, const ContentKey& key) {
  const int64_t size[] = {kKeyLength};
  Tensor out = torch::stable::new_empty(like, {size, 1}, ScalarType::Long);
  std::memcpy(out.mutable_data_ptr(), &key, sizeof(key));
  return out;
}

}  // namespace

uint64_t sample_of_rows(const Tensor& matrix, int64_t begin, int64_t end, int64_t index) {
  if (matrix.numel() == 0) return 0;
  const Sampling sampling(matrix.size(0), matrix.size(1));
  const char* data = static_cast<const char*>(matrix.const_data_ptr());
  const int64_t width = static_cast<int64_t>(matrix.element_size());
  const int64_t row_stride = matrix.stride(0) * width, col_stride = matrix.stride(1) * width;
  constexpr int64_t kTogether = 128;  // that are fetched at once, since each may wait for memory
  const char* at[kTogether];
  uint64_t sum = 0;
  for (int64_t q = sampling.first_of(begin), last = sampling.first_of(end); q < last; q += kTogether) {
    const int64_t count = std::min(kTogether, last - q);
    for (int64_t i = 0; i < count; ++i) {
      at[i] = data + sampling.row(q + i) * row_stride + sampling.col(q + i) * col_stride;
      __builtin_prefetch(at[i]);
    }
    for (int64_t i = 0; i < count; ++i)
      sum += hash_word(bits_at(at[i], width), kLoneHigh, static_cast<uint64_t>(index * kKeySamples + q + i));
  }
  return sum;
}

ContentKey key_without_sample(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                              double scaling, bool per_output, int64_t version) {
  return {Hashes(lora_A, lora_B).of(nullptr, 0).first, 0,
          host_key(weight, lora_A, lora_B, scaling, per_output, version)};
}

Tensor cpu::content_key(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        int64_t version) {
  check_adapter(weight, lora_A, lora_B);
  const auto [factors, sample] = Hashes(lora_A, lora_B).of(&weight, 1);
  return key_on(weight, {factors, sample, host_key(weight, lora_A, lora_B, scaling, per_output, version)});
}

Tensor cpu::content_key_of(Tensor lora_A, Tensor lora_B, std::vector<Tensor> made_of, int64_t host) {
  check_matrix(lora_A, "lora_A");
  check_matrix(lora_B, "lora_B");
  for (const Tensor& matrix : made_of)
    STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2, "made_of must be matrices on a CPU");
  const auto [factors, sample] =
      Hashes(lora_A, lora_B).of(made_of.data(), static_cast<int64_t>(made_of.size()));
  return key_on(lora_A, {factors, sample, static_cast<uint64_t>(host)});
}

}  // namespace lora_fast
