// The CUDA kernels, compiled for the CPU by device.cuh, under their names in the library: in a process that
// has not loaded lora_fast._C, whose place they take.
#include "../../csrc/cuda/table.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/ops.h>
#include <lora_fast/device.cuh>

#include <exception>
#include <string>
#include <utility>

namespace {

using torch::stable::Tensor;

int current = -1;  // device: that of a tensor on the CPU
bool streams = true;

// Notes the product; whether it is to be computed.
bool begin_product(const char* name) {
  lora_fast::host::launched.push_back({nullptr, name});
  return !lora_fast::host::only_noted;
}

Tensor widened(const Tensor& tensor) {
  const int64_t sizes[] = {tensor.size(0), tensor.size(1)};
  Tensor wide = torch::stable::empty({sizes, 2}, torch::headeronly::ScalarType::Float);
  return torch::stable::copy_(wide, tensor);
}

// Which PyTorch has on a GPU alone.
Tensor mm_dtype_out(Tensor a, Tensor b, torch::headeronly::ScalarType, Tensor out) {
  if (begin_product("mm.dtype_out"))
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), widened(a).get(), widened(b).get()));
  return out;
}

}  // namespace

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return streams ? 0 : 1;
}
// With NaN in it under torch.use_deterministic_algorithms, as on a GPU.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t*, int32_t dtype,
                                        int32_t, int32_t, AtenTensorHandle* tensor) {
  const auto number =
      torch::stable::detail::to<torch::headeronly::ScalarType>(torch::stable::detail::from(dtype));
  try {
    const Tensor made = torch::stable::empty({sizes, static_cast<size_t>(dims)}, number);
    return aoti_torch_new_tensor_handle(made.get(), tensor);
  } catch (const std::exception&) {
    return 1;
  }
}
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
  return begin_product("mm") ? aoti_torch_cpu_mm_out(out, a, b) : 0;
}
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle c, AtenTensorHandle a,
                                         AtenTensorHandle b, double beta, double alpha) {
  return begin_product("addmm") ? aoti_torch_cpu_addmm_out(out, c, a, b, beta, alpha) : 0;
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
// The names of what was launched since the last call, each on a line; from now on nothing is computed, if
// asked so.
const char* lora_fast_host_launched(bool only_note) {
  static std::string names;
  names.clear();
  for (const auto& launch : std::exchange(lora_fast::host::launched, {}))
    names += lora_fast::host::name_of(launch) + '\n';
  lora_fast::host::only_noted = only_note;
  return names.c_str();
}
void lora_fast_host_give_streams(bool give) {
  streams = give;
}
}

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CPU, m) {
  lora_fast::cuda::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("mm.dtype_out", TORCH_BOX(&mm_dtype_out));
}
