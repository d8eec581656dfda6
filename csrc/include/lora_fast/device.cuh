// What the kernels need of the hardware beyond plain C++: types, launches, asynchronous copies and tensor
// cores. The kernels use nothing else of CUDA but threadIdx, blockIdx, gridDim, __syncthreads and
// __shfl_xor_sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define LORA_FAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace lora_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// Dynamic shared memory; every kernel divides it up itself.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

inline cudaError_t current_device(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

// With `overlap` (on compute capability 9 and later), the kernel may start before the one in front of it in
// the stream has ended; it calls wait_for_former_kernel before it reads what that one wrote.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, bool overlap,
                   cudaStream_t stream, Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    // not to `shared`: another thread may be about to launch this kernel with more
    int most = 0;
    if (const cudaError_t error = current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most))
      return error;
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most))
      return error;
  }
  int major = 0;
  cudaFuncAttributes code{};
  if (overlap) {
    if (const cudaError_t error = current_device(cudaDevAttrComputeCapabilityMajor, &major)) return error;
    if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  // code made of older PTX does not wait, whatever the device
  config.numAttrs = major >= 9 && code.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__device__ inline void wait_for_former_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, of which the first `bytes` are read and the others are zero.
__device__ inline void copy_async_16(void* to_shared, const void* from, int bytes) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups of copies are under way.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and takes
// from matrix i the elements (l / 4, 2 (l % 4) + {0, 1}), or with `transpose` those of the transposed matrix.
template <bool transpose>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// c += a b, a [16, 16], b [16, 8], c [16, 8], products exact and sums float32. With g = lane / 4, q = lane %
// 4, a lane holds a(g + {0, 8}, 2q + {0, 1} + {0, 8}), b(2q + {0, 1} + {0, 8}, g) and c(g + {0, 8}, 2q + {0,
// 1}).
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Data that is read once goes past the first-level cache.
__device__ inline uint4 load_once(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}

}  // namespace lora_fast::cuda
