// Stands in for csrc/include/lora_fast/device.cuh: the kernels as C++ functions for the CPU, so that their
// arithmetic, indices and barriers run without a GPU. The threads of a block are fibers that take turns at
// barriers and at the operations of a warp; blocks run one after another.
//
// Seen here: what is computed, alignment of 16-byte accesses, use of shared memory past its end or before it
// is written (it begins as NaN), of an asynchronous copy before it is waited for (NaN until then), missing
// barriers (threads may run in either order). Not seen: speed, and what the hardware itself does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define LORA_FAST_KERNEL(threads, blocks) void

namespace lora_fast::host {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;
constexpr size_t kGuard = 64;
// The least that a block may have on a device of compute capability 8.0 or later: that of 8.6, 8.9 and 12.0.
constexpr size_t kMostShared = 99 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host CUDA: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool begun = false, done = false;
  std::deque<std::vector<Copy>> copies;  // under way, in groups; the last is not committed
};

// What the lanes of a warp show each other, for two operations in turn: a lane is one ahead of the others at
// most.
struct Warp {
  alignas(16) char shown[2][kWarp][32];
  int arrived = 0, round = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> operations;  // of each thread
  std::vector<char> shared;
  int arrived = 0, round = 0, current = 0, left = 0, turn = 0;
  std::function<void()> kernel;
  jmp_buf scheduler;
};

inline Block* block = nullptr;
inline bool backwards = false;  // the order in which threads take turns
inline int multiprocessors = 3;
inline void (*between_blocks)() = nullptr;  // what another stream does meanwhile

struct Launch {
  const void* kernel;   // or null:
  const char* product;  // of PyTorch's, by its name
};
inline std::vector<Launch> launched;
inline bool only_noted = false;  // and nothing computed

inline std::string name_of(const Launch& launch) {
  if (launch.kernel == nullptr) return launch.product;
  Dl_info found{};
  if (dladdr(launch.kernel, &found) == 0 || found.dli_saddr != launch.kernel) fail("a kernel without a name");
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr), std::free);
  return name.get();
}

inline uint3 thread_index{}, block_index{};
inline dim3 grid_size{};

inline void yield() {
  Fiber& fiber = block->fibers[block->current];
  if (_setjmp(fiber.here) == 0) _longjmp(block->scheduler, 1);
}

// Waits until `members` threads have arrived.
inline void wait(int& arrived, int& round, int members) {
  const int mine = round;
  if (++arrived == members) {
    arrived = 0;
    ++round;
  }
  while (round == mine) yield();
}

// Shows x to the warp; returns a function that gives what another lane has shown.
template <class T>
auto show(const T& x) {
  static_assert(sizeof(T) <= sizeof(Warp::shown[0][0]));
  Warp& warp = block->warps[thread_index.x / kWarp];
  auto* shown = warp.shown[block->operations[thread_index.x]++ % 2];
  std::memcpy(shown[thread_index.x % kWarp], &x, sizeof(T));
  wait(warp.arrived, warp.round, kWarp);
  return [shown](int lane) {
    T other;
    std::memcpy(&other, shown[lane], sizeof(T));
    return other;
  };
}

inline void run_fiber() {
  block->kernel();
  block->fibers[block->current].done = true;
  --block->left;
  _longjmp(block->scheduler, 1);
}

inline void run_block(int threads, size_t shared) {
  block->shared.assign(shared + kGuard, static_cast<char>(0xFF));
  block->left = threads;
  block->arrived = 0;
  for (Warp& warp : block->warps) warp.arrived = 0;
  for (Fiber& fiber : block->fibers) {
    fiber.begun = fiber.done = false;
    fiber.copies.assign(1, {});
  }
  for (block->turn = 0; block->left > 0; ++block->turn) {
    const int index = block->turn % threads;
    block->current = backwards ? threads - 1 - index : index;
    Fiber& fiber = block->fibers[block->current];
    if (fiber.done) continue;
    thread_index = {static_cast<unsigned>(block->current), 0, 0};
    if (_setjmp(block->scheduler) != 0) continue;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    setcontext(&fiber.start);
  }
  for (size_t k = shared; k < shared + kGuard; ++k)
    if (block->shared[k] != static_cast<char>(0xFF)) fail("a kernel wrote past its shared memory");
}

inline void run_grid(dim3 grid, int threads, size_t shared, std::function<void()> kernel) {
  if (threads % kWarp != 0) fail("threads of a block must be whole warps");
  static Block own;  // whose stacks are used again
  own.fibers.resize(threads);
  own.warps.resize(threads / kWarp);
  own.operations.resize(threads);
  own.kernel = std::move(kernel);
  block = &own;
  grid_size = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      if (between_blocks != nullptr && x + y > 0) between_blocks();
      block_index = {x, y, 0};
      run_block(threads, shared);
    }
  }
  block = nullptr;
}

inline float bits_to_float(uint16_t bits, __nv_bfloat16*) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}
inline float bits_to_float(uint16_t bits, __half*) {
  return __half2float(__half(__half_raw{bits}));
}

}  // namespace lora_fast::host

#define threadIdx (lora_fast::host::thread_index)
#define blockIdx (lora_fast::host::block_index)
#define gridDim (lora_fast::host::grid_size)

inline void __syncthreads() {
  auto* block = lora_fast::host::block;
  lora_fast::host::wait(block->arrived, block->round, static_cast<int>(block->fibers.size()));
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned x) {
  const unsigned former = *at;
  *at += x;
  return former;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
  return lora_fast::host::show(x)((threadIdx.x % 32) ^ lanes);
}

namespace lora_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline char* shared_memory() {
  return host::block->shared.data();  // as malloc aligns it, to 16 bytes
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, bool,
                   cudaStream_t, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || shared > host::kMostShared)
    return cudaErrorInvalidConfiguration;
  host::launched.push_back({reinterpret_cast<const void*>(kernel), nullptr});
  if (host::only_noted) return cudaSuccess;
  host::run_grid(grid, static_cast<int>(threads), shared,
                 [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

inline cudaError_t current_device(cudaDeviceAttr attribute, int* value) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = host::multiprocessors;
  return cudaSuccess;
}

inline void wait_for_former_kernel() {}
inline void let_next_kernel_start() {}

inline void copy_async_16(void* to_shared, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to_shared) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    host::fail("an asynchronous copy is not aligned");
  if (bytes < 0 || bytes > 16) host::fail("an asynchronous copy of other than 0 to 16 bytes");
  std::memset(to_shared, 0xFF, 16);
  host::block->fibers[threadIdx.x].copies.back().push_back({to_shared, from, bytes});
}
inline void commit_copies() {
  host::block->fibers[threadIdx.x].copies.emplace_back();
}
template <int pending>
void wait_for_copies() {
  for (auto& copies = host::block->fibers[threadIdx.x].copies; copies.size() - 1 > pending;
       copies.pop_front()) {
    for (const host::Copy& copy : copies.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

template <bool transpose>
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host::fail("a matrix's row is not aligned");
  const auto rows = host::show(static_cast<const uint16_t*>(row));
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = transpose ? rows(8 * i + 2 * q)[g] : rows(8 * i + g)[2 * q];
    const uint32_t high = transpose ? rows(8 * i + 2 * q + 1)[g] : rows(8 * i + g)[2 * q + 1];
    to[i] = high << 16 | low;
  }
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto lanes = host::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const auto half = [](uint32_t word, int k) {
    return host::bits_to_float(static_cast<uint16_t>(k % 2 != 0 ? word >> 16 : word),
                               static_cast<T*>(nullptr));
  };
  // tensor cores round the sum of an instruction once, at its end (Fasi et al., "Numerical behavior of NVIDIA
  // tensor cores", 2021)
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 16; ++k) {
    const Operands row = lanes(4 * g + k % 8 / 2);
    for (int e = 0; e < 2; ++e) {
      const double b = half(lanes(4 * (2 * q + e) + k % 8 / 2).b[k / 8], k);
      sums[e] += half(row.a[2 * (k / 8)], k) * b;
      sums[2 + e] += half(row.a[2 * (k / 8) + 1], k) * b;
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sums[i]);
}

inline uint4 load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) host::fail("a load of 16 bytes is not aligned");
  return *static_cast<const uint4*>(from);
}

}  // namespace lora_fast::cuda
