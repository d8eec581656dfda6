// scaled = gain ⊙ grad_y, dgain = Σ_t grad_y ⊙ product, dbias = Σ_t grad_y, in one pass over grad_y and
// product.
//
//   1. lora_gain_bwd_kernel  each block takes some columns of some tokens; its sums are partial, [splits, 2,
//   width]
//   2. lora_gain_bwd_sum     adds the splits in order
//
// A split has 64 tokens at least, so that the partial sums are 1/16 of a 16-bit grad_y at most.
#pragma once

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

template <class T>
struct GainGrad {
  const T* grad;     // [tokens, width], contiguous
  const T* product;  // the same, or null
  const float* gain;
  T* scaled;  // the same as grad, or null
  int64_t tokens, width, per_split;
  float* partial;    // [splits, 2, width]
  float* grad_gain;  // [width] or null
  float* grad_bias;
};

constexpr int kGainThreads = 256, kGainWarps = kGainThreads / 32;
constexpr int64_t kGainTokens = 64;

// kColumns: of a lane, Vector<T>::kSize (width a multiple of it) or 1
template <class T, int kColumns>
LORA_FAST_KERNEL(kGainThreads, 3)
lora_gain_bwd_kernel(GainGrad<T> op) {
  constexpr int kUnroll = 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * kColumns;
  const int64_t begin = blockIdx.y * op.per_split;
  const int64_t end = begin + op.per_split < op.tokens ? begin + op.per_split : op.tokens;
  const bool inside = col < op.width;
  float gain[kColumns], gain_sum[kColumns] = {}, bias_sum[kColumns] = {};
#pragma unroll
  for (int k = 0; k < kColumns; ++k) gain[k] = inside && op.scaled != nullptr ? op.gain[col + k] : 0;

  const auto load = [](const T* from, T(&to)[kColumns]) {
    if constexpr (kColumns == 1) {
      to[0] = *from;
    } else {
      const Vector<T> vector = load_vector(from);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) to[k] = vector.at[k];
    }
  };
  for (int64_t first = begin + warp; inside && first < end; first += kUnroll * kGainWarps) {
    T grad[kUnroll][kColumns], product[kUnroll][kColumns];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t t = first + u * kGainWarps;
      if (t >= end) break;
      load(op.grad + t * op.width + col, grad[u]);
      if (op.product != nullptr) load(op.product + t * op.width + col, product[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t t = first + u * kGainWarps;
      if (t >= end) break;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float g = widen(grad[u][k]);
        bias_sum[k] += g;
        if (op.product != nullptr) gain_sum[k] += g * widen(product[u][k]);
      }
      if (op.scaled == nullptr) continue;
      if constexpr (kColumns == 1) {
        op.scaled[t * op.width + col] = rounded<T>(widen(grad[u][0]) * gain[0]);
      } else {
        Vector<T> scaled;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) scaled.at[k] = rounded<T>(widen(grad[u][k]) * gain[k]);
        store_vector(op.scaled + t * op.width + col, scaled);
      }
    }
  }
  if (op.partial == nullptr) return;

  // Over the warps, in order: shared [kGainWarps][2][32 · kColumns]
  float* shared = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = 2 * 32 * kColumns;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    shared[warp * kSums + lane * kColumns + k] = gain_sum[k];
    shared[warp * kSums + kSums / 2 + lane * kColumns + k] = bias_sum[k];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kSums; at += kGainThreads) {
    const int64_t to = static_cast<int64_t>(blockIdx.x) * 32 * kColumns + at % (kSums / 2);
    if (to >= op.width) continue;
    float sum = 0;
    for (int w = 0; w < kGainWarps; ++w) sum += shared[w * kSums + at];
    op.partial[(2 * blockIdx.y + at / (kSums / 2)) * op.width + to] = sum;
  }
}

template <class T>
LORA_FAST_KERNEL(kGainThreads, 2)
lora_gain_bwd_sum(GainGrad<T> op, int64_t splits) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kGainThreads + threadIdx.x;
  if (col >= op.width) return;
  double gain = 0, bias = 0;  // a chain of hundreds of additions, for one thread a column
  for (int64_t split = 0; split < splits; ++split) {
    if (op.grad_gain != nullptr) gain += op.partial[2 * split * op.width + col];
    if (op.grad_bias != nullptr) bias += op.partial[(2 * split + 1) * op.width + col];
  }
  if (op.grad_gain != nullptr) op.grad_gain[col] = static_cast<float>(gain);
  if (op.grad_bias != nullptr) op.grad_bias[col] = static_cast<float>(bias);
}

template <class T>
bool gain_bwd_in_vectors(const GainGrad<T>& op) {
  const void* all[] = {op.grad, op.product, op.scaled};
  bool aligned = true;
  for (const void* data : all) aligned = aligned && lines_are_aligned<T>(data, op.width);
  return aligned;
}

// Into how many splits the tokens go: [splits, 2, width] floats are op.partial.
template <class T>
cudaError_t plan_lora_gain_bwd(GainGrad<T>* op, int64_t* splits) {
  int multiprocessors = 0;
  if (const cudaError_t error = current_device(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  const int64_t columns = divide_up(op->width, 32 * (gain_bwd_in_vectors(*op) ? Vector<T>::kSize : 1));
  const int64_t wanted = divide_up(8 * multiprocessors, columns), most = divide_up(op->tokens, kGainTokens);
  *splits = wanted < most ? wanted : most < 1 ? 1 : most;
  op->per_split = divide_up(op->tokens, *splits);
  return cudaSuccess;
}

template <class T>
cudaError_t lora_gain_bwd(const GainGrad<T>& op, int64_t splits, cudaStream_t stream) {
  const bool vectors = gain_bwd_in_vectors(op);
  const int columns = 32 * (vectors ? Vector<T>::kSize : 1);
  const auto kernel = vectors ? lora_gain_bwd_kernel<T, Vector<T>::kSize> : lora_gain_bwd_kernel<T, 1>;
  const size_t shared = kGainWarps * 2 * columns * sizeof(float);
  const dim3 grid(divide_up(op.width, columns), splits);
  const cudaError_t error = launch(kernel, grid, kGainThreads, shared, false, stream, op);
  if (error != cudaSuccess || op.partial == nullptr) return error;
  return launch(lora_gain_bwd_sum<T>, dim3(divide_up(op.width, kGainThreads)), kGainThreads, 0, false, stream,
                op, splits);
}

}  // namespace lora_fast::cuda
