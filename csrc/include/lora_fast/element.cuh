// Elements of float32, bfloat16 and float16: their widening, rounding and 16-byte vectors.
#pragma once

#include <lora_fast/device.cuh>

#include <cstring>

namespace lora_fast::cuda {

enum class Dtype : int { f32, bf16, f16 };

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(bf16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(f16 x) {
  return __half2float(x);
}

template <class T>
__device__ T rounded(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

__device__ inline float element(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::bf16:
      return widen(static_cast<const bf16*>(data)[index]);
    case Dtype::f16:
      return widen(static_cast<const f16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ inline void store_element(void* data, Dtype dtype, int64_t index, float x) {
  switch (dtype) {
    case Dtype::bf16:
      static_cast<bf16*>(data)[index] = rounded<bf16>(x);
      return;
    case Dtype::f16:
      static_cast<f16*>(data)[index] = rounded<f16>(x);
      return;
    default:
      static_cast<float*>(data)[index] = x;
  }
}

// As many elements as 16 bytes hold.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <class T>
__device__ Vector<T> load_vector(const T* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  Vector<T> vector;
  memcpy(&vector, &raw, sizeof(raw));
  return vector;
}

template <class T>
__device__ void store_vector(T* to, const Vector<T>& vector) {
  uint4 raw;
  memcpy(&raw, &vector, sizeof(raw));
  *reinterpret_cast<uint4*>(to) = raw;
}

inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether each line of `stride` elements starts at a multiple of 16 bytes.
template <class T>
bool lines_are_aligned(const void* data, int64_t stride) {
  return is_aligned(data) && stride % Vector<T>::kSize == 0;
}

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The sum over the block's threads, in every thread; shared memory [threads / 32].
template <class T>
__device__ T sum_of_block(T x, T* shared, int threads) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < threads / 32; ++warp) sum += shared[warp];
  return sum;
}

}  // namespace lora_fast::cuda
