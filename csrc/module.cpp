// The Python module: loading it registers the kernels of ops.cpp; by itself it only tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

#ifndef LORA_FAST_TORCH_VERSION
#error "setup.py defines LORA_FAST_TORCH_VERSION"
#endif

namespace {

std::vector<std::string> isa_compiled() {
  std::vector<std::string> isa{"generic"};
#if LORA_FAST_HAS_CLONES
  isa.emplace_back("avx2");
  isa.emplace_back("avx512");
#endif
#if LORA_FAST_HAS_AVX512_BF16
  isa.emplace_back("avx512_bf16");
#endif
#if defined(LORA_FAST_EMULATE_AMX)
  isa.emplace_back("amx_bf16 (emulated)");
#elif LORA_FAST_HAS_AMX
  isa.emplace_back("amx_bf16");
#endif
  return isa;
}

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef LORA_FAST_CUDA_ARCHS
  info["kind"] = "cuda";
  info["cuda_archs"] = LORA_FAST_CUDA_ARCHS;
#else
  info["kind"] = "cpu";
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = LORA_FAST_TORCH_VERSION;
  info["torch_target"] = "2.10";
  info["isa"] = isa_compiled();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lora_fast; import torch first.";
  m.def("build_info", &build_info,
        "How this module was built: kind, compiler, torch, torch_target, isa, cuda_archs.");
  m.def("cpu_features", &lora_fast::cpu_features, "What this processor has of isa.");
  m.def("vectors", &lora_fast::vectors,
        "Whose vectors the kernels use here, in PyTorch's words: AVX512, AVX2 or DEFAULT.");
  m.def("cpu_family", &lora_fast::cpu_family,
        "The maker and the family of an x86 processor, or an empty name and 0.");
  m.def("amx_enabled", &lora_fast::amx_enabled, "Whether kernels use AMX.");
  m.def("allow_amx", &lora_fast::allow_amx, pybind11::arg("allowed"),
        "Tests turn AMX off to reach the other kernels.");
  m.def("avx512_bf16_enabled", &lora_fast::avx512_bf16_enabled,
        "Whether kernels use the pairwise products of AVX512-BF16 where they do not use AMX.");
  m.def("allow_avx512_bf16", &lora_fast::allow_avx512_bf16, pybind11::arg("allowed"),
        "Tests turn AVX512-BF16 on and off to reach the kernels with and without it.");
}
