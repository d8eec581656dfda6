// For arithmetic that must be the same on the CPU and on the GPU: one source for g++ and for nvcc.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_FAST_SHARED __host__ __device__ inline
#else
// Always: what takes a vector must be compiled for its caller's instruction set.
#define LORA_FAST_SHARED inline __attribute__((always_inline))
#endif
