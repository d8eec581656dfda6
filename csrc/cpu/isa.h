// What the compiler and the processor allow. No torch header here: the module's build information reads it
// too.
#pragma once

#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(LORA_FAST_ONE_ISA)
// One body, three instruction sets, chosen by the loader; LORA_FAST_ONE_ISA leaves the compiler's own alone.
#define LORA_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LORA_FAST_HAS_CLONES 1
#else
#define LORA_FAST_CLONES
#define LORA_FAST_HAS_CLONES 0
#endif

#if defined(LORA_FAST_EMULATE_AMX) || (defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
                                       !defined(__clang__) && __GNUC__ >= 12)
#define LORA_FAST_HAS_AMX 1
#else
#define LORA_FAST_HAS_AMX 0
#endif
#if LORA_FAST_HAS_CLONES && !defined(LORA_FAST_EMULATE_AMX)
#define LORA_FAST_HAS_AVX512_BF16 1
#else
#define LORA_FAST_HAS_AVX512_BF16 0
#endif

#define LORA_FAST_ALWAYS_INLINE __attribute__((always_inline))  // of a lambda
#define LORA_FAST_INLINE inline LORA_FAST_ALWAYS_INLINE

namespace lora_fast {

std::vector<std::string> cpu_features();

// Whose vectors the kernels use here, in PyTorch's words: AVX512, AVX2 or DEFAULT.
std::string vectors();
bool has_avx512_vectors();

// The maker of an x86 processor and its family: {"AuthenticAMD", 26} is Zen 5. Of others {"", 0}.
std::pair<std::string, int> cpu_family();

// AMX is used where it was compiled in, the processor has it, the kernel grants it and no test turned it off;
// where it is emulated (tiles.h), everywhere. The pairwise products of AVX512-BF16 are used where they are
// faster than float32's, or where a test allowed them.
bool amx_enabled();
void allow_amx(bool allowed);
bool avx512_bf16_enabled();
void allow_avx512_bf16(bool allowed);

}  // namespace lora_fast
