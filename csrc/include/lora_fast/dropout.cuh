// out = x / (1 - p) where kept, 0 elsewhere; what is kept depends on seed, row and column alone. The seed is
// read on the device.
#pragma once

#include <lora_fast/dropout_mask.h>

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

template <class T>
struct Dropout {
  const T* x;  // [rows, cols], contiguous
  T* out;
  int64_t rows, cols;
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

constexpr int kDropoutThreads = 256;

// kColumns: of a thread, Vector<T>::kSize (cols a multiple of it) or 1. Each block takes one row.
template <class T, int kColumns>
LORA_FAST_KERNEL(kDropoutThreads, 2)
dropout_kernel(Dropout<T> op) {
  const int64_t row = blockIdx.x;
  const RowMask mask(static_cast<uint64_t>(*op.seed), static_cast<uint64_t>(row));
  const T* x = op.x + row * op.cols;
  T* out = op.out + row * op.cols;
  const auto drop = [&](T value, int64_t col) {
    return rounded<T>(mask.word(static_cast<uint32_t>(col)) >= op.threshold ? widen(value) * op.scale : 0.0f);
  };
  for (int64_t col = threadIdx.x * kColumns; col < op.cols; col += kDropoutThreads * kColumns) {
    if constexpr (kColumns == 1) {
      out[col] = drop(x[col], col);
    } else {
      Vector<T> vector = load_vector(x + col);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) vector.at[k] = drop(vector.at[k], col + k);
      store_vector(out + col, vector);
    }
  }
}

template <class T>
cudaError_t dropout(const Dropout<T>& op, cudaStream_t stream) {
  const bool vectors = lines_are_aligned<T>(op.x, op.cols) && lines_are_aligned<T>(op.out, op.cols);
  const auto kernel = vectors ? dropout_kernel<T, Vector<T>::kSize> : dropout_kernel<T, 1>;
  return launch(kernel, dim3(op.rows), kDropoutThreads, 0, false, stream, op);
}

}  // namespace lora_fast::cuda
