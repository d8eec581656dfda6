#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if LORA_FAST_HAS_AMX && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_fast {
namespace {

#if LORA_FAST_HAS_AMX && !defined(LORA_FAST_EMULATE_AMX)
// AVX-512 as the loader asks for it, which looks at what the operating system saves, and its bfloat16.
bool detect_avx512_bf16() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned avx512_bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & avx512_bf16) != 0;
}
#endif

bool detect_amx() {
#if defined(LORA_FAST_EMULATE_AMX)
  return true;
#elif LORA_FAST_HAS_AMX
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  // which comes with it, unless a hypervisor hides it
  if (!detect_avx512_bf16()) return false;
  // Linux saves the tile registers of a process only after it has asked for them.
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

bool amx_available() {
  static const bool available = detect_amx();
  return available;
}

bool avx512_bf16_available() {
#if LORA_FAST_HAS_AVX512_BF16
  static const bool available = detect_avx512_bf16();
  return available;
#else
  return false;
#endif
}

// Intel's processors begin a pairwise product every other cycle, and up to two of float32 in each: widened to
// float32, sixteen columns take 0.7 of the time there.
bool pairs_pay() {
#if LORA_FAST_HAS_AVX512_BF16
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::atomic<bool> amx_allowed{true}, avx512_bf16_allowed{pairs_pay()};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.emplace_back("avx512");
#endif
  if (avx512_bf16_available()) found.emplace_back("avx512_bf16");
#ifndef LORA_FAST_EMULATE_AMX
  if (amx_available()) found.emplace_back("amx_bf16");
#endif
  return found;
}

bool has_avx512_vectors() {
#if LORA_FAST_HAS_CLONES
  return __builtin_cpu_supports("x86-64-v4");
#elif defined(__AVX512F__)
  return true;
#else
  return false;
#endif
}

std::string vectors() {
  if (has_avx512_vectors()) return "AVX512";
#if LORA_FAST_HAS_CLONES
  return __builtin_cpu_supports("x86-64-v3") ? "AVX2" : "DEFAULT";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "DEFAULT";
#endif
}

std::pair<std::string, int> cpu_family() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return {};
  char maker[12];
  std::memcpy(maker, &ebx, 4);
  std::memcpy(maker + 4, &edx, 4);
  std::memcpy(maker + 8, &ecx, 4);
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const unsigned family = eax >> 8 & 0xf, extended = eax >> 20 & 0xff;
  return {{maker, sizeof(maker)}, static_cast<int>(family == 0xf ? family + extended : family)};
#else
  return {};
#endif
}

bool amx_enabled() {
  return amx_available() && amx_allowed.load(std::memory_order_relaxed);
}

void allow_amx(bool allowed) {
  amx_allowed.store(allowed, std::memory_order_relaxed);
}

bool avx512_bf16_enabled() {
  return avx512_bf16_available() && avx512_bf16_allowed.load(std::memory_order_relaxed);
}

void allow_avx512_bf16(bool allowed) {
  avx512_bf16_allowed.store(allowed, std::memory_order_relaxed);
}

}  // namespace lora_fast
