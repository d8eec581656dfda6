// A made-up device in place of CUDA's runtime, which prints what launch.cu asks of it.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

cudaError_t launch(size_t shared, bool overlap);

namespace {

int major = 0, ptx = 0;  // compute capability of the device; that for which the kernel's PTX was made

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 101376 : major;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = ptx;
  attributes->binaryVersion = 10 * major;  // also of older PTX, which the driver compiles for its device
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  std::printf("up to %d, ", value);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  std::printf("launch %zu%s\n", config->dynamicSmemBytes, config->numAttrs > 0 ? " early" : "");
  return cudaSuccess;
}
}

// Arguments: major, ptx, bytes of shared memory, whether to overlap.
int main(int, char** arguments) {
  major = std::atoi(arguments[1]);
  ptx = std::atoi(arguments[2]);
  return launch(std::atoi(arguments[3]), std::atoi(arguments[4]) != 0);
}
