// PyTorch's products of matrices, cuBLAS's on a GPU, as C++ calls on the current stream.
//
// The dispatcher's call of a product by name (torch_call_dispatcher) takes neither beta nor alpha, and costs
// the host 1 µs more than the function behind it, in a case where that takes 0.8 µs (measured on a CPU,
// without the product); a transposed view by name costs 1.3 µs, one of the same storage 0.2 µs.
#pragma once

#include "binding.h"

// Weak, so that the module loads under a torch without CUDA. Declared as torch's header does (2.11's and
// 2.13's), which is generated for all operators and not among the stable ones.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                            AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}

namespace lora_fast::cuda {

// Rows and columns of a tensor's memory from its element `first` on.
inline Tensor view(const Tensor& tensor, int64_t first, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, first, &handle), "view");
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, 0, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

// out = a b. A float32 out of 16-bit operands is not rounded to 16 bits on the way.
inline void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  if (out.scalar_type() == a.scalar_type()) {
    check_torch(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()), "mm");
    return;
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out.scalar_type()),
                                    torch::stable::detail::from(out)};
  check_torch(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION), "mm");
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference
}

// out = beta c + alpha a b, rounded once; beta 0 reads no c.
inline void multiply_add(const Tensor& c, double beta, const Tensor& a, const Tensor& b, double alpha,
                         Tensor& out) {
  check_torch(aoti_torch_cuda_addmm_out(out.get(), c.get(), a.get(), b.get(), beta, alpha), "addmm");
}

}  // namespace lora_fast::cuda
