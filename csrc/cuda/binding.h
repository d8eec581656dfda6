// From torch's tensors to the kernels' operands: checks, dtypes, the device and its stream, errors of a
// launch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <lora_fast/rank_tile.cuh>
#include <optional>
#include <utility>

// Weak, so that the module loads under a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

// Weak too: torch has it from 2.13 on. Before that it tells why a call failed on stderr alone.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace lora_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of torch's C functions, with torch's own message: callers know by it that memory has run out.
inline void check_torch(AOTITorchError error, const char* function) {
  if (error == 0) return;
  const bool tells = torch_exception_get_what_without_backtrace != nullptr;
  STD_TORCH_CHECK(false, function, ": ", tells ? torch_exception_get_what_without_backtrace() : "failed");
}

inline void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is reported here is not reported to the next caller again
  STD_TORCH_CHECK(false, op, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device the current one while it lives; gives its current stream.
class OnDevice {
 public:
  OnDevice(const Tensor& tensor, const char* op) : device_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, op,
                    ": no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
    check_launch(cudaGetDevice(&former_), op);
    // last: no destructor gives the device back where the constructor throws
    if (device_ != former_) check_launch(cudaSetDevice(device_), op);
  }
  ~OnDevice() {
    if (device_ != former_) cudaSetDevice(former_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  int device_, former_ = 0;
  cudaStream_t stream_ = nullptr;
};

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got dtype number ",
                      static_cast<int>(tensor.scalar_type()));
      return Dtype::f32;
  }
}

inline void check_shape(const Tensor& tensor, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must be [",
                  rows, ", ", cols, "]");
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " must be on device ",
                  like.get_device_index(), ", got ", tensor.get_device_index());
}

// A matrix on the device of `like`.
inline Operand operand(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  check_device(tensor, name, like);
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.size(0),
          tensor.size(1),          tensor.stride(0),       tensor.stride(1)};
}

// A contiguous vector of `size` elements on the device of `like`.
inline const void* vector_data(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must be [", size, "]");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  check_device(tensor, name, like);
  return tensor.const_data_ptr();
}

// gain, norm and their gradients: bfloat16 cannot tell gains near 1 apart.
inline const float* float_data(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
  return static_cast<const float*>(vector_data(tensor, name, size, like));
}

// weight [N, K], lora_A [R, K], lora_B [N, R]
inline void check_adapter(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2, "weight and lora_A must have 2 dimensions");
  check_shape(lora_A, "lora_A", lora_A.size(0), weight.size(1));
  check_shape(lora_B, "lora_B", weight.size(0), lora_A.size(0));
}

// Contiguous, of one or two dimensions; torch::stable::new_empty takes the host 1.5 µs more.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size,
                    std::optional<ScalarType> dtype = {}) {
  constexpr auto kName = "empty";
  const int64_t last = size.begin()[size.size() - 1];
  const int64_t strides[] = {size.size() == 2 && last > 0 ? last : 1, 1};
  int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type), kName);
  const int32_t number =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type())));
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(), strides, number,
                                       device_type, like.get_device_index(), &handle),
              kName);
  return Tensor(handle);
}

// The tensor itself where it is contiguous.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

template <class Function>
void by_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::bf16:
      return function(Type<bf16>());
    case Dtype::f16:
      return function(Type<f16>());
    case Dtype::f32:
      return function(Type<float>());
  }
}

// function(Type<T>, Type<E>) for base's type T; E is T where all three are one 16-bit type, and float
// otherwise.
template <class Function>
void by_dtypes(Dtype base, Dtype p, Dtype q, Function&& function) {
  by_dtype(base, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (p == base && q == base) return function(type, type);
    }
    function(type, Type<float>());
  });
}

}  // namespace lora_fast::cuda
