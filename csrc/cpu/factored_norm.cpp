#include "factored_norm.h"

#include <cmath>

#include "parallel.h"

namespace lora_fast {
namespace {

// n² has too few digits left where ‖W‖² and the cross terms are this many times n² together: of sums that are
// rounded to 16 bits, and of those that stay float32.
constexpr double kCancellation = 8, kCancellationFloat = 2;
// And where it is less than this many times |s| ‖W‖ Σ_r |B_r| ‖A_r‖ / √K, to which the error of U is
// proportional, which then may reach four units of float32: with A in two parts, and in float32.
constexpr double kErrorOfParts = 32, kErrorOfFloat = 2;

LORA_FAST_CLONES void split_row(const float* row, int64_t length, bf16* first, bf16* second) {
  for (int64_t k = 0; k < length; k += kLanes) {
    const f32x16 all = load<float>(row + k);
    store<float>(first + k, all);
    store<float>(second + k, all - load<float>(first + k));
  }
}

// out [length in whole vectors] = row `row` of a contiguous matrix, zero-padded
LORA_FAST_CLONES void widen_row(const Factor& matrix, int64_t row, int64_t length, float* out) {
  LORA_FAST_BY_DTYPE(matrix.dtype, T,
                     convert_line(out, static_cast<const T*>(matrix.data) + row * length, 1, length))
  std::fill(out + length, out + round_up(length, kLanes), 0.0f);
}

LORA_FAST_INLINE f32x16 absolute(f32x16 x) {
  return (f32x16)((u32x16)x & 0x7fffffffu);
}

constexpr int64_t kRows = 4;  // that share a load

// gram[q] = Σ_k a[k] rows[q][k] for q < count, in double: B G Bᵀ may cancel
LORA_FAST_CLONES void dot_rows(const float* a, const float* rows, int64_t count, int64_t length,
                               double* gram) {
  for (int64_t q = 0; q < count; q += kRows) {
    f64x16 sums[kRows] = {};
    const float* at[kRows];
    for (int64_t i = 0; i < kRows; ++i) at[i] = rows + std::min(q + i, count - 1) * length;
    for (int64_t k = 0; k < length; k += kLanes) {
      const f64x16 here = load<double>(a + k);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) sums[i] += here * load<double>(at[i] + k);
    }
    for (int64_t i = 0; i < std::min(kRows, count - q); ++i) gram[q + i] = sum_lanes<double>(sums[i]);
  }
}

struct Adapter {
  const float* lora_B;   // of the rows, [kRows][width]
  const double* gram;    // G [rank][width]
  const float* lengths;  // ‖A_r‖ [width]
  int64_t rank, width, parts;
  double scaling;
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

struct Update {
  double sum;      // what the adapter adds to ‖W‖²: 2 s B U + s² B G Bᵀ
  double cross;    // 2 |s| Σ_r |B_r U_r|
  double lengths;  // |s| Σ_r |B_r| ‖A_r‖
};

// Of kRows rows.
LORA_FAST_CLONES void update_squares(const Adapter& op, const float* u, int64_t ld, Update* updates) {
  f64x16 sum[kRows] = {};
  f32x16 cross[kRows] = {}, lengths[kRows] = {};
  const double s = op.scaling;
  for (int64_t at = 0; at < op.width; at += kLanes) {
    f64x16 row[kRows] = {};
    for (int64_t r = 0; r < op.rank; ++r) {
      const f64x16 g = load<double>(op.gram + r * op.width + at);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) row[i] += static_cast<double>(op.lora_B[i * op.width + r]) * g;
    }
    const f32x16 length = load<float>(op.lengths + at);
    for (int64_t i = 0; i < kRows; ++i) {
      const f32x16 b = load<float>(op.lora_B + i * op.width + at), own = projected(op, u + i * ld, at);
      sum[i] += from_f32<double>(b) * (2 * s * from_f32<double>(own) + s * s * row[i]);
      cross[i] += absolute(b * own);
      lengths[i] += absolute(b) * length;
    }
  }
  for (int64_t i = 0; i < kRows; ++i)
    updates[i] = {sum_lanes<double>(sum[i]), 2 * std::abs(s) * sum_lanes<float>(cross[i]),
                  std::abs(s) * sum_lanes<float>(lengths[i])};
}

}  // namespace

FactoredNorm::FactoredNorm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                           bool in_parts)
    : v_(weight, lora_A, lora_B, scaling),
      parts_count_(in_parts && lora_A.scalar_type() == ScalarType::Float ? 2 : 1),
      width_(round_up(v_.rank, kLanes)),
      split_(parts_count_ == 2 ? columns() * weight.size(1) : 0),
      parts_(parts_count_ == 2 ? split_.data() : static_cast<const bf16*>(lora_A.const_data_ptr())),
      rows_(lora_A.scalar_type() == ScalarType::Float ? static_cast<const float*>(lora_A.const_data_ptr())
                                                      : widened_.emplace(v_.rank * weight.size(1)).data()),
      gram_(v_.rank * width_),
      lengths_(width_) {
  const int64_t R = v_.rank, K = weight.size(1);
  for_chunks(chunk_count(R, 8), R, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (widened_) widen_row(v_.q, r, K, widened_->data() + r * K);
      if (parts_count_ == 2) split_row(rows_ + r * K, K, split_.data() + r * K, split_.data() + (R + r) * K);
    }
  });
  std::memset(gram_.data(), 0, static_cast<size_t>(R * width_) * sizeof(double));
  std::memset(lengths_.data(), 0, static_cast<size_t>(width_) * sizeof(float));
  for_chunks(chunk_count(R, 8), R, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i % 2 == 0 ? i / 2 : R - 1 - i / 2;  // long and short rows of the triangle in turn
      dot_rows(rows_ + r * K, rows_, r + 1, K, gram_.data() + r * width_);
      lengths_.data()[r] = static_cast<float>(std::sqrt(gram_.data()[r * width_ + r]));
    }
  });
  for (int64_t r = 0; r < R; ++r)
    for (int64_t q = r + 1; q < R; ++q) gram_.data()[r * width_ + q] = gram_.data()[q * width_ + r];
  if (in_parts) {  // the products take the parts
    widened_.reset();
    rows_ = nullptr;
  }
}

void FactoredNorm::finish(int64_t first, const float* squares, const float* u, int64_t ld,
                          const float* magnitude, float* norm, float* gain) const {
  const double cancellation = v_.dtype == ScalarType::Float ? kCancellationFloat : kCancellation;
  const double error_of_U = (parts_count_ == 2 ? kErrorOfParts : kErrorOfFloat) / std::sqrt(v_.cols);
  std::optional<Scratch<double>> buffer;
  const Scratch<float> lora_B(kRows * width_);
  for (int64_t i = 0; i < kTileRows; i += kRows) {
    for (int64_t j = 0; j < kRows; ++j) widen_row(v_.p, first + i + j, v_.rank, lora_B.data() + j * width_);
    Update updates[kRows];
    update_squares({lora_B.data(), gram_.data(), lengths_.data(), v_.rank, width_, parts_count_, v_.scaling},
                   u + i * ld, ld, updates);
    for (int64_t j = 0; j < kRows; ++j) {
      const int64_t row = i + j;
      const double square = squares[row], sum = square + updates[j].sum;
      // written so that NaN is redone too
      const bool redo = needs_redo(sum, false) || !(cancellation * sum >= square + updates[j].cross) ||
                        !(sum >= error_of_U * std::sqrt(square) * updates[j].lengths);
      if (redo && !buffer) buffer.emplace(2 * v_.cols + v_.rank);
      norm[row] =
          static_cast<float>(redo ? norm_of_line(v_, true, first + row, buffer->data()) : std::sqrt(sum));
      gain[row] = norm[row] == 0.0f ? 0.0f : magnitude[row] / norm[row];
    }
  }
}

}  // namespace lora_fast
