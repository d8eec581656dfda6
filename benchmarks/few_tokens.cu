// The CUDA kernel for few tokens in each shape that it could be built in: microseconds, as JSON. gpu_tune
// compiles and runs it: nvcc -std=c++20 -O3 -arch=native -I csrc/include benchmarks/few_tokens.cu
#include <lora_fast/lora_linear_small_fwd.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

using namespace lora_fast::cuda;

namespace {

constexpr int64_t N = 4096, K = 4096, R = 16, kFlush = 256 << 20;
constexpr int kRounds = 31;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "few_tokens: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* allocated(int64_t size) {
  T* data = nullptr;
  check(cudaMalloc(&data, size * sizeof(T)));
  return data;
}

bf16* random(int64_t size, float scale) {
  std::vector<bf16> values(size);
  uint32_t state = 1;
  for (bf16& value : values) {
    state = state * 1664525u + 1013904223u;
    value = __float2bfloat16(scale * (static_cast<float>(state >> 8) / (1 << 23) - 1));
  }
  bf16* data = allocated<bf16>(size);
  check(cudaMemcpy(data, values.data(), size * sizeof(bf16), cudaMemcpyHostToDevice));
  return data;
}

__global__ void read_all(const float4* from, int64_t size, float* to) {
  float sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x)
    sum += from[i].x + from[i].y + from[i].z + from[i].w;
  if (sum == 1234.5f) *to = sum;  // never, but the compiler does not know
}

__global__ void spin(long long cycles) {
  for (const long long start = clock64(); clock64() - start < cycles;) {
  }
}

struct Operands {
  bf16 *x = random(16 * K, 1), *W = random(N * K, 0.02f), *A = random(R * K, 0.02f), *B = random(N * R, 0.1f);
  bf16 *y = allocated<bf16>(16 * N), *h = allocated<bf16>(16 * R);
  float *gain = allocated<float>(N), *partial = allocated<float>(64 * 16 * R), *to = allocated<float>(1);
  float4* flush = allocated<float4>(kFlush / sizeof(float4));
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;

  Operands() {
    const std::vector<float> ones(N, 1.0f);
    check(cudaMemcpy(gain, ones.data(), N * sizeof(float), cudaMemcpyHostToDevice));
    check(cudaMemset(flush, 0, kFlush));
    check(cudaStreamCreate(&stream));
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
  }
};

// Microseconds of one call, with the L2 cache emptied before it and the host ahead.
template <class Shape>
float call(const Operands& o, int tokens) {
  const int splits = static_cast<int>(small_splits(K, R));
  const SmallProject<bf16> project{o.x, o.A, tokens, K, R, o.partial};
  const SmallLinear<bf16> linear{o.x,     o.W,        K,    o.B,     o.partial, {o.gain, nullptr},
                                 nullptr, Dtype::f32, 0.5f, tokens,  splits,    N,
                                 K,       R,          o.y,  nullptr, o.h};
  read_all<<<1024, 256, 0, o.stream>>>(o.flush, kFlush / sizeof(float4), o.to);
  spin<<<1, 1, 0, o.stream>>>(100000);
  check(cudaEventRecord(o.begin, o.stream));
  check(lora_linear_small_fwd<bf16, bf16, Shape>(project, linear, o.stream));
  check(cudaEventRecord(o.end, o.stream));
  check(cudaStreamSynchronize(o.stream));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, o.begin, o.end));
  return 1e3f * ms;
}

std::vector<float> results(const Operands& o, int tokens) {
  std::vector<bf16> raw(tokens * N);
  check(cudaMemcpy(raw.data(), o.y, raw.size() * sizeof(bf16), cudaMemcpyDeviceToHost));
  std::vector<float> values(raw.size());
  std::transform(raw.begin(), raw.end(), values.begin(), [](bf16 value) { return __bfloat162float(value); });
  return values;
}

struct Entrant {
  int rows, depth, blocks;
  float (*call)(const Operands&, int);
};

template <int rows, int depth, int blocks>
constexpr Entrant entrant() {
  return {rows, depth, blocks, call<SmallShape<rows, depth, blocks>>};
}

}  // namespace

int main() {
  const Operands o;
  // of which two steps or more of a block are on their way together
  const Entrant entrants[] = {entrant<32, 64, 1>(), entrant<16, 64, 1>(), entrant<16, 64, 2>(),
                              entrant<32, 32, 1>(), entrant<32, 32, 2>(), entrant<16, 128, 1>()};
  const int tokens[] = {1, 4, 8, 16};
  std::map<int, std::vector<float>> expected;
  std::string text = "[";
  for (const Entrant& entrant : entrants) {
    double difference = 0;
    for (const int T : tokens) {
      check(cudaMemset(o.y, 0xff, 16 * N * sizeof(bf16)));  // NaN where nothing is written
      entrant.call(o, T);
      const std::vector<float> found = results(o, T);
      if (expected[T].empty()) expected[T] = found;
      double error = 0, size = 0;
      for (size_t i = 0; i < found.size(); ++i) {
        error += std::pow(found[i] - expected[T][i], 2);
        size += std::pow(expected[T][i], 2);
      }
      const double relative = std::sqrt(error / size);
      difference = relative <= difference ? difference : relative;  // NaN stays
    }
    char line[256];
    std::snprintf(line, sizeof(line),
                  "%s\n{\"value\": {\"rows\": %d, \"depth\": %d, \"blocks\": %d}, \"difference\": %g",
                  text.size() > 1 ? "," : "", entrant.rows, entrant.depth, entrant.blocks,
                  std::isfinite(difference) ? difference : 1e9);
    text += line;
    text += ", \"us\": {";
    for (const int T : tokens) {
      std::vector<float> us;
      for (int round = 0; round < kRounds; ++round) us.push_back(entrant.call(o, T));
      std::nth_element(us.begin(), us.begin() + kRounds / 2, us.end());
      std::snprintf(line, sizeof(line), "%s\"%d tokens, 4096×4096, rank 16\": %.2f",
                    T == tokens[0] ? "" : ", ", T, us[kRounds / 2]);
      text += line;
    }
    text += "}}";
  }
  std::printf("%s\n]\n", text.c_str());
}
