// What the two directions of the blocked linear share: sizes of blocks, the rank operand; and with
// the one for few tokens: checks, gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "amx_product.h"
#include "parallel.h"
#include "small_common.h"

namespace lora_fast {

// A block of the product, 352 × 512 sums, and the packed operands of one of its steps in depth stay in the
// second-level cache.
constexpr int64_t kTokenBlock = 512;
constexpr int64_t kBlockPanels = 11;
constexpr int64_t kBlockSteps = 16;

void check_float_vector(const Tensor& tensor, const char* name, int64_t size);

// The arguments that the kernels for few tokens and those in blocks have in common, but for the weight's own
// check: activations have its dtype, the adapter too or float32.
void check_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                      const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, const Tensor& y,
                      const std::optional<Tensor>& product, const char* gain_name = "gain");

void check_factor(const Tensor& tensor, const char* name, ScalarType dtype);
void check_activation(const Tensor& tensor, const char* name, ScalarType dtype, int64_t tokens, int64_t cols);

// DoRA's gain of a forward: magnitude / norm, 0 where the norm is 0. An unknown norm is made along with the
// product.
struct DoraGain {
  DoraGain(const Tensor& magnitude, Tensor& norm, bool norm_known);
  const float* magnitude;
  float* norm;
  bool known;
  Scratch<float> gain;
};

// Which gradients a backward is asked for.
struct Needs {
  bool x, A, B, gain, bias;
};

void check_linear_bwd(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight,
                      const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& gain,
                      const std::optional<Tensor>& product, const std::optional<Tensor>& h,
                      const Needs& needs);

// x, lora_A, lora_B, gain and bias, empty where it is not needed
struct Gradients {
  Gradients(const Tensor& grad_y, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
            const Needs& needs);
  Tensor x, A, B, gain, bias;
};

// A contiguous matrix of a 16-bit type or float32.
struct AdapterMatrix {
  const void* data;
  int64_t rows, cols;
  bool wide;

  explicit AdapterMatrix(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        rows(tensor.size(0)),
        cols(tensor.size(1)),
        wide(tensor.scalar_type() == ScalarType::Float) {}
  AdapterMatrix(const void* m, bool is_wide, int64_t row_count, int64_t col_count)
      : data(m), rows(row_count), cols(col_count), wide(is_wide) {}
};

// Whether every bfloat16 stays one when multiplied by the scaling: a power of two (or its negative, or zero).
inline bool keeps_bf16(double scaling) {
  int exponent = 0;
  const double mantissa = std::frexp(scaling, &exponent);
  return scaling == 0.0 || (std::fabs(mantissa) == 0.5 && exponent > -64 && exponent < 64);
}

// out [rows][width] = factor · m from `row` on in bfloat16, zero-padded; with `split` the rounding error, in
// bfloat16 too, follows at column m.cols: their sum is the float32 product to 2^-17.
void round_rows(const AdapterMatrix& m, int64_t row, int64_t rows, float factor, bool split, int64_t width,
                bf16* out);

// 16-bit elements as float32 in the order of strips; count is a multiple of a strip.
template <class T>
void widen_strips(const T* x, int64_t count, float* out);

// A line of float32, rounded to 16 bits.
template <class T>
void round_line(const float* from, int64_t count, T* to);

// The rows of a matrix in the 16-bit or float32 type T, and zero rows up to a multiple of `step`; copied only
// where its elements are of another type or rows are missing. Its columns are whole vectors.
template <class T>
class WholeRows {
 public:
  explicit WholeRows(const AdapterMatrix& m, int64_t step = 1)
      : count_(round_up(m.rows, step)),
        rounds_(m.wide && sizeof(T) == 2),
        copied_(rounds_ || count_ != m.rows ? count_ * m.cols : 0),
        data_(static_cast<const T*>(m.data)) {
    if (!rounds_ && count_ == m.rows) return;
    const int64_t size = m.rows * m.cols;
    for_chunks(std::min(m.rows, chunk_count(size, 65536)), m.rows, [&](int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * m.cols, count = (end - begin) * m.cols;
      if constexpr (sizeof(T) == 2) {
        if (rounds_) return round_line(static_cast<const float*>(m.data) + at, count, copied_.data() + at);
      }
      std::memcpy(copied_.data() + at, data_ + at, static_cast<size_t>(count) * sizeof(T));
    });
    std::memset(copied_.data() + size, 0, static_cast<size_t>((count_ - m.rows) * m.cols) * sizeof(T));
    data_ = copied_.data();
  }
  const T* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  bool rounds_;
  Scratch<T> copied_;
  const T* data_;
};

}  // namespace lora_fast
