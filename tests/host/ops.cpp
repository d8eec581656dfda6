// The CUDA kernels, compiled for the CPU by device.cuh, under their names in the library: in a process that
// has not loaded lora_fast._C, whose place they take.
#include "../../csrc/cuda/table.h"

#include <lora_fast/device.cuh>

namespace {

int current = -1;  // device: that of a tensor on the CPU
bool streams = true;

}  // namespace

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return streams ? 0 : 1;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the host";
}

// For tests: the order in which a block's threads take turns, and for how many multiprocessors kernels are
// planned.
void lora_fast_host_configure(bool backwards, int multiprocessors) {
  lora_fast::host::backwards = backwards;
  lora_fast::host::multiprocessors = multiprocessors;
}
void lora_fast_host_between_blocks(void (*act)()) {
  lora_fast::host::between_blocks = act;
}
void lora_fast_host_give_streams(bool give) {
  streams = give;
}
}

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CPU, m) {
  lora_fast::cuda::implement(m);
}
