#include "lora_linear_common.h"

#include <torch/csrc/stable/ops.h>

namespace lora_fast {
namespace {

// out = factor · m, and left what the rounding leaves, for one vector
template <class T, class Out>
LORA_FAST_INLINE void round_lanes(const T* m, float factor, Out* out, Out* left) {
  const f32x16 value = factor * load<float>(m);
  store<float>(out, value);
  if (left == nullptr) return;
  const f32x16 rest = value - load<float>(out);
  // of an infinite value nothing is left
  store<float>(left, rest == rest ? rest : f32x16{});
}

template <class T, class Out>
LORA_FAST_CLONES void round_row(const T* m, int64_t cols, float factor, Out* out, Out* left) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes)
    round_lanes(m + i, factor, out + i, left != nullptr ? left + i : nullptr);
  if (i == cols) return;
  const auto count = static_cast<size_t>(cols - i);
  T part[kLanes] = {};
  Out rounded[kLanes], rest[kLanes];
  std::memcpy(part, m + i, count * sizeof(T));
  round_lanes(part, factor, rounded, left != nullptr ? rest : nullptr);
  std::memcpy(out + i, rounded, count * sizeof(Out));
  if (left != nullptr) std::memcpy(left + i, rest, count * sizeof(Out));
}

void check_factors(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_adapter(weight, lora_A, lora_B);
  check_factor(lora_A, "lora_A", weight.scalar_type());
  check_factor(lora_B, "lora_B", weight.scalar_type());
}

Tensor empty_if(bool needed, const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const int64_t none[] = {0};
  return needed ? torch::stable::new_empty(like, {size.begin(), size.size()}, dtype)
                : torch::stable::new_empty(like, {none, 1}, dtype);
}

}  // namespace

void check_float_vector(const Tensor& tensor, const char* name, int64_t size) {
  check_vector(tensor, name, size);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be contiguous float32");
}

void check_factor(const Tensor& tensor, const char* name, ScalarType dtype) {
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype || tensor.scalar_type() == ScalarType::Float, name,
                  " must have the weight's dtype or float32, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
}

void check_activation(const Tensor& tensor, const char* name, ScalarType dtype, int64_t tokens,
                      int64_t cols) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have the weight's dtype, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
  check_contiguous(tensor, name);
  check_size(tensor, name, 0, tokens);
  check_size(tensor, name, 1, cols);
}

void check_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                      const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, const Tensor& y,
                      const std::optional<Tensor>& product, const char* gain_name) {
  check_matrix(x, "x");
  check_factors(weight, lora_A, lora_B);
  const int64_t tokens = x.size(0), N = weight.size(0);
  check_activation(x, "x", weight.scalar_type(), tokens, weight.size(1));
  if (gain) check_float_vector(*gain, gain_name, N);
  if (bias) check_float_vector(*bias, "bias", N);
  check_activation(y, "y", weight.scalar_type(), tokens, N);
  if (product) {
    check_same(*product, "product", y, "y");
    check_contiguous(*product, "product");
  }
}

DoraGain::DoraGain(const Tensor& magnitudes, Tensor& norms, bool norm_known)
    : magnitude(static_cast<const float*>(magnitudes.const_data_ptr())),
      norm((check_float_vector(norms, "norm", magnitudes.size(0)),
            static_cast<float*>(norms.mutable_data_ptr()))),
      known(norm_known),
      gain(magnitudes.size(0)) {
  for (int64_t i = 0; known && i < magnitudes.size(0); ++i)
    gain.data()[i] = norm[i] == 0.0f ? 0.0f : magnitude[i] / norm[i];
}

void check_linear_bwd(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight,
                      const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& gain,
                      const std::optional<Tensor>& product, const std::optional<Tensor>& h,
                      const Needs& needs) {
  check_matrix(grad_y, "grad_y");
  check_factors(weight, lora_A, lora_B);
  const int64_t tokens = grad_y.size(0), N = weight.size(0);
  check_activation(grad_y, "grad_y", weight.scalar_type(), tokens, N);
  if (gain) check_float_vector(*gain, "gain", N);
  const auto check_kept = [&](const std::optional<Tensor>& kept, const char* name, int64_t cols) {
    STD_TORCH_CHECK(kept.has_value(), name, " must be given for the gradients asked for");
    check_activation(*kept, name, weight.scalar_type(), tokens, cols);
  };
  if (needs.gain) check_kept(product, "product", N);
  if (needs.A) check_kept(x, "x", weight.size(1));
  if (needs.B) check_kept(h, "h", lora_A.size(0));
}

Gradients::Gradients(const Tensor& grad_y, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                     const Needs& needs)
    : x(empty_if(needs.x, grad_y, {grad_y.size(0), weight.size(1)}, grad_y.scalar_type())),
      A(empty_if(needs.A, lora_A, {lora_A.size(0), lora_A.size(1)}, lora_A.scalar_type())),
      B(empty_if(needs.B, lora_B, {lora_B.size(0), lora_B.size(1)}, lora_B.scalar_type())),
      gain(empty_if(needs.gain, grad_y, {weight.size(0)}, ScalarType::Float)),
      bias(empty_if(needs.bias, grad_y, {weight.size(0)}, ScalarType::Float)) {}

template <class T>
LORA_FAST_CLONES void widen_strips(const T* x, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += kStrip) store_packed<float>(out + k, load_strip<float>(x + k));
}
template void widen_strips(const bf16*, int64_t, float*);
template void widen_strips(const f16*, int64_t, float*);

template <class T>
void round_line(const float* from, int64_t count, T* to) {
  round_row<float, T>(from, count, 1.0f, to, nullptr);
}
template void round_line(const float*, int64_t, bf16*);
template void round_line(const float*, int64_t, f16*);

void round_rows(const AdapterMatrix& m, int64_t row, int64_t rows, float factor, bool split, int64_t width,
                bf16* out) {
  const int64_t filled = split ? 2 * m.cols : m.cols;
  for (int64_t i = 0; i < rows; ++i, out += width) {
    bf16* left = split ? out + m.cols : nullptr;
    if (m.wide) {
      round_row(static_cast<const float*>(m.data) + (row + i) * m.cols, m.cols, factor, out, left);
    } else {
      round_row(static_cast<const bf16*>(m.data) + (row + i) * m.cols, m.cols, factor, out, left);
    }
    std::memset(out + filled, 0, static_cast<size_t>(width - filled) * sizeof(bf16));
  }
}

}  // namespace lora_fast
