// dv = gain ⊙ dy in one pass over dy, with the sums over tokens, and what is made of them:
//
//   dbias = Σ_t dy    dlora_B = s gain ⊙ P, P = dyᵀ h
//   dgain = Σ_t dy ⊙ v, or, where base was kept and not v, Σ_t dy ⊙ base + s rowsum(P ⊙ lora_B)
//   dmagnitude = dgain / norm, 0 where norm is 0
//
//   1. lora_gain_bwd_kernel  each block takes some columns of some tokens; its sums are partial, [splits, 2,
//   width]
//   2. lora_gain_bwd_finish  adds the splits in a fixed order, and finishes all of them; P is a product
//   between
//
// A split has 64 tokens at least, so that the partial sums are 1/16 of a 16-bit dy at most.
#pragma once

#include <lora_fast/gain.cuh>

namespace lora_fast::cuda {

template <class T>
struct GainGrad {
  const T* grad;     // dy [tokens, width], contiguous
  const T* product;  // v or base, the same, or null
  Gain gain;
  T* scaled;  // dv, rows of which are stride_scaled apart, or null
  int64_t stride_scaled, tokens, width, per_split;
  float* partial;          // [splits, 2, width] or null
  const float* rank_sums;  // P [width, rank], contiguous, where the rank is not 0
  const void* lora_B;      // the same
  Dtype factor_dtype;      // of lora_B and grad_B
  int64_t rank;
  float scaling;
  bool from_base;    // whether product is base, and the gain wants P
  float* grad_gain;  // [width] or null: of the magnitude, where there is a norm
  float* grad_bias;
  void* grad_B;  // [width, rank] or null
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
  for (int k = 0; k < kColumns; ++k) gain[k] = inside && op.scaled != nullptr ? gain_at(op.gain, col + k) : 0;

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
        op.scaled[t * op.stride_scaled + col] = rounded<T>(widen(grad[u][0]) * gain[0]);
      } else {
        Vector<T> scaled;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) scaled.at[k] = rounded<T>(widen(grad[u][k]) * gain[k]);
        store_vector(op.scaled + t * op.stride_scaled + col, scaled);
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

// A warp takes a column, so that a block's eight share the partial sums' sectors, and its lanes the splits
// and ranks.
template <class T>
LORA_FAST_KERNEL(kGainThreads, 2)
lora_gain_bwd_finish(GainGrad<T> op, int64_t splits) {
  const int lane = threadIdx.x % 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kGainWarps + threadIdx.x / 32;
  if (col >= op.width) return;
  double gain = 0, bias = 0;  // long chains of additions
  for (int64_t split = lane; split < splits; split += 32) {
    if (op.grad_gain != nullptr) gain += op.partial[2 * split * op.width + col];
    if (op.grad_bias != nullptr) bias += op.partial[(2 * split + 1) * op.width + col];
  }
  const float factor = op.scaling * gain_at(op.gain, col);
  for (int64_t r = lane; r < op.rank; r += 32) {
    const int64_t at = col * op.rank + r;
    const float sum = op.rank_sums[at];
    if (op.from_base) gain += op.scaling * sum * element(op.lora_B, op.factor_dtype, at);
    if (op.grad_B != nullptr) store_element(op.grad_B, op.factor_dtype, at, factor * sum);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    gain += __shfl_xor_sync(0xFFFFFFFFu, gain, lanes);
    bias += __shfl_xor_sync(0xFFFFFFFFu, bias, lanes);
  }
  if (lane != 0) return;
  if (op.grad_gain != nullptr) op.grad_gain[col] = static_cast<float>(gain) / divisor(op.gain, col);
  if (op.grad_bias != nullptr) op.grad_bias[col] = static_cast<float>(bias);
}

template <class T>
bool gain_bwd_in_vectors(const GainGrad<T>& op) {
  return lines_are_aligned<T>(op.grad, op.width) && lines_are_aligned<T>(op.product, op.width) &&
         lines_are_aligned<T>(op.scaled, op.stride_scaled);
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
  return launch(kernel, grid, kGainThreads, shared, false, stream, op);
}

// After lora_gain_bwd, where anything is summed.
template <class T>
cudaError_t finish_lora_gain_bwd(const GainGrad<T>& op, int64_t splits, cudaStream_t stream) {
  return launch(lora_gain_bwd_finish<T>, dim3(divide_up(op.width, kGainWarps)), kGainThreads, 0, false,
                stream, op, splits);
}

}  // namespace lora_fast::cuda
