#include "factored_norm.h"

#include <cmath>
#include <optional>

#include "parallel.h"

namespace lora_fast {
namespace {

// Where the terms of n² are this many times n² together, too few digits of n² are left: of sums that are
// rounded to 16 bits, and of those that stay float32.
constexpr float kCancellation = 8, kCancellationFloat = 2;

LORA_FAST_CLONES void split_row(const float* row, int64_t length, bf16* first, bf16* second) {
  for (int64_t k = 0; k < length; k += kLanes) {
    const f32x16 all = load<float>(row + k);
    store<float>(first + k, all);
    store<float>(second + k, all - load<float>(first + k));
  }
}

// out [length in whole vectors] = a row, zero-padded
LORA_FAST_CLONES void widen_row(const void* row, ScalarType dtype, int64_t length, float* out) {
  LORA_FAST_BY_DTYPE(dtype, T, convert_line(out, static_cast<const T*>(row), 1, length))
  std::fill(out + length, out + round_up(length, kLanes), 0.0f);
}

LORA_FAST_INLINE f32x16 absolute(f32x16 x) {
  return (f32x16)((u32x16)x & 0x7fffffffu);
}

// The sum of the lanes, in pairs.
LORA_FAST_INLINE float lane_sum(f32x16 v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
  return v[0] + v[1];
}

constexpr int64_t kRows = 4;  // that share a load

// gram[q] = Σ_k a[k] rows[q][k] for q < count
LORA_FAST_CLONES void dot_rows(const float* a, const float* rows, int64_t count, int64_t length,
                               float* gram) {
  for (int64_t q = 0; q < count; q += kRows) {
    f32x16 sums[kRows] = {};
    const float* at[kRows];
    for (int64_t i = 0; i < kRows; ++i) at[i] = rows + std::min(q + i, count - 1) * length;
    for (int64_t k = 0; k < length; k += kLanes) {
      const f32x16 here = load<float>(a + k);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) sums[i] += here * load<float>(at[i] + k);
    }
    for (int64_t i = 0; i < std::min(kRows, count - q); ++i) gram[q + i] = lane_sum(sums[i]);
  }
}

struct Adapter {
  const float *lora_B, *gram, *lengths;  // of the row, [width]; G [rank][width]; √G_rr [width]
  int64_t rank, width, parts;
  float scaling, coherence;
};

// U of one row, sixteen ranks from `at` on, zero past the last: the sum of its parts
LORA_FAST_INLINE f32x16 projected(const Adapter& op, const float* u, int64_t at) {
  f32x16 sum{};
  for (int64_t part = 0; part < op.parts; ++part) {
    if (at + kLanes <= op.rank) {
      sum += load<float>(u + part * op.rank + at);
      continue;
    }
    float some[kLanes] = {};
    for (int64_t i = at; i < op.rank; ++i) some[i - at] = u[part * op.rank + i];
    sum += load<float>(some);
  }
  return sum;
}

// What an adapter adds to ‖W‖², and how large its terms are.
struct Update {
  float sum;        // 2 s B U + s² B G Bᵀ
  float linear;     // 2 |s| Σ_r |B_r U_r|
  float quadratic;  // s² coherence Σ_r B_r² G_rr, at least s² Σ_rq |B_r G_rq B_q|
};

// Of kRows rows.
LORA_FAST_CLONES void update_squares(const Adapter& op, const float* u, int64_t ld, Update* updates) {
  f32x16 sum[kRows] = {}, linear[kRows] = {}, length[kRows] = {};
  const float s = op.scaling;
  for (int64_t at = 0; at < op.width; at += kLanes) {
    f32x16 row[kRows] = {};
    for (int64_t r = 0; r < op.rank; ++r) {
      const f32x16 g = load<float>(op.gram + r * op.width + at);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) row[i] += op.lora_B[i * op.width + r] * g;
    }
    const f32x16 lengths = load<float>(op.lengths + at);
    for (int64_t i = 0; i < kRows; ++i) {
      const f32x16 b = load<float>(op.lora_B + i * op.width + at), cross = b * projected(op, u + i * ld, at);
      sum[i] += 2 * s * cross + s * s * (b * row[i]);
      linear[i] += absolute(cross);
      length[i] += (b * lengths) * (b * lengths);
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    updates[i] = {lane_sum(sum[i]), 2 * std::fabs(s) * lane_sum(linear[i]),
                  s * s * op.coherence * lane_sum(length[i])};
  }
}

// max_r Σ_q |G_rq| / √(G_rr G_qq): how far the rows of A are from orthogonal, from 1 to the rank.
float coherence(const float* gram, const float* lengths, int64_t rank, int64_t width) {
  float largest = 0;
  for (int64_t r = 0; r < rank; ++r) {
    float sum = 0;
    for (int64_t q = 0; q < rank; ++q)
      if (gram[r * width + q] != 0) sum += std::fabs(gram[r * width + q]) / (lengths[r] * lengths[q]);
    largest = std::max(largest, sum);
  }
  return largest;
}

}  // namespace

FactoredNorm::FactoredNorm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                           bool in_parts)
    : v_(weight, lora_A, lora_B, scaling),
      parts_count_(in_parts && lora_A.scalar_type() == ScalarType::Float ? 2 : 1),
      width_(round_up(v_.rank, kLanes)),
      parts_(in_parts ? padded_columns() * weight.size(1) : 0),
      widened_(lora_A.scalar_type() == ScalarType::Float ? 0 : v_.rank * weight.size(1)),
      rows_(widened_.data()),
      gram_(v_.rank * width_),
      lengths_(width_),
      lora_B_(weight.size(0) * width_) {
  const int64_t R = v_.rank, N = weight.size(0), K = weight.size(1);
  const auto row_of = [](const Tensor& m, int64_t row, int64_t cols) -> const void* {
    return static_cast<const char*>(m.const_data_ptr()) + row * cols * static_cast<int64_t>(m.element_size());
  };
  const bool wide_A = lora_A.scalar_type() == ScalarType::Float;
  if (wide_A) rows_ = static_cast<const float*>(lora_A.const_data_ptr());
  for_chunks(chunk_count(R, 8), R, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (!wide_A) widen_row(row_of(lora_A, r, K), lora_A.scalar_type(), K, widened_.data() + r * K);
      if (!in_parts) continue;
      bf16* part = parts_.data() + r * K;
      if (wide_A) {
        split_row(rows_ + r * K, K, part, part + R * K);
      } else {
        std::memcpy(part, row_of(lora_A, r, K), static_cast<size_t>(K) * sizeof(bf16));
      }
    }
  });
  if (in_parts)
    std::memset(parts_.data() + columns() * K, 0,
                static_cast<size_t>((padded_columns() - columns()) * K) * sizeof(bf16));
  std::memset(gram_.data(), 0, static_cast<size_t>(R * width_) * sizeof(float));
  for_chunks(chunk_count(R, 8), R, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) dot_rows(rows_ + r * K, rows_, R, K, gram_.data() + r * width_);
  });
  for (int64_t r = 0; r < width_; ++r)
    lengths_.data()[r] = r < R ? std::sqrt(gram_.data()[r * width_ + r]) : 0;
  coherence_ = coherence(gram_.data(), lengths_.data(), R, width_);
  for_chunks(chunk_count(N, 1024), N, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      widen_row(row_of(lora_B, n, R), lora_B.scalar_type(), R, lora_B_.data() + n * width_);
  });
}

void FactoredNorm::finish(int64_t first, int64_t rows, const float* squares, const float* u, int64_t ld,
                          const float* magnitude, float* norm, float* gain) const {
  std::optional<Scratch<double>> buffer;
  Update updates[kRows];
  const float cancellation = v_.dtype == ScalarType::Float ? kCancellationFloat : kCancellation;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    const Adapter op{
        lora_B_.data() + row * width_,  gram_.data(), lengths_.data(), v_.rank, width_, parts_count_,
        static_cast<float>(v_.scaling), coherence_};
    if (i % kRows == 0) update_squares(op, u + i * ld, ld, updates);
    const Update& update = updates[i % kRows];
    const float sum = squares[i] + update.sum;
    const float terms = squares[i] + update.linear + update.quadratic;
    // written so that NaN is redone too
    const bool redo = needs_redo(sum, false) || !(cancellation * sum >= terms);
    if (redo) {
      if (!buffer) buffer.emplace(2 * v_.cols + v_.rank);
      norm[i] = static_cast<float>(norm_of_line(v_, true, row, buffer->data()));
    } else {
      norm[i] = std::sqrt(sum);
    }
    gain[i] = norm[i] == 0.0f ? 0.0f : magnitude[i] / norm[i];
  }
}

}  // namespace lora_fast
