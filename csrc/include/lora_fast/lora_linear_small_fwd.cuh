// y = gain ⊙ (x Wᵀ + s h lora_Bᵀ) + bias, h = x lora_Aᵀ, for 1 to 16 tokens: the time is that of reading W
// once.
//
//   1. lora_project_small     partial sums of h, float32 [splits, T, R]
//   2. lora_linear_small      W's rows through registers into the tensor cores, 16 bytes a load, without
//                             shared memory; h is added up and rounded when the product is done, so that on
//                             compute capability 9 and later this kernel reads W while the first still runs
//
// In a product a bᵀ over k the order of k is free as long as a and b share it: a lane reads eight adjacent k
// of a row and distributes them over two multiplications.
#pragma once

#include <lora_fast/gain.cuh>

namespace lora_fast::cuda {

constexpr int kSmallThreads = 256, kSmallWarps = kSmallThreads / 32;
constexpr int kSmallTokens = 16;
constexpr int kProjectDepth = 64;  // k of one step of a warp: a line of 128 bytes of each row

// What lora_linear_small is made for: rows of W in a block at most, 16 or 32; k of one step of a warp; blocks
// that share a multiprocessor. setup.py takes them from triton_kernels/constants.json, where they were
// measured.
#ifndef LORA_FAST_SMALL_ROWS
#define LORA_FAST_SMALL_ROWS 32
#define LORA_FAST_SMALL_DEPTH 64
#define LORA_FAST_SMALL_BLOCKS 2
#endif
template <int kMostRows, int kDepth, int kBlocks>
struct SmallShape {
  static constexpr int most_rows = kMostRows, depth = kDepth, blocks = kBlocks;
};
using BuiltSmallShape = SmallShape<LORA_FAST_SMALL_ROWS, LORA_FAST_SMALL_DEPTH, LORA_FAST_SMALL_BLOCKS>;

template <class T>
struct SmallProject {
  const T* x;  // [tokens, K], contiguous, K a multiple of 8
  const void* lora_A;
  int tokens;
  int64_t K, R;
  float* partial;  // [splits, tokens, R]
};

template <class T>
struct SmallLinear {
  const T* x;
  const T* weight;  // [N, K], columns adjacent
  int64_t stride_weight_n;
  const void* lora_B;  // [N, R], contiguous
  const float* partial;
  Gain gain;
  const void* bias;  // [N] or null
  Dtype bias_dtype;
  float scaling;
  int tokens, splits;
  int64_t N, K, R;
  T* y;     // [tokens, N]
  T* base;  // x Wᵀ, the same, or null
  T* h;     // [tokens, R]
};

// Eight adjacent elements as T's bits, two in a word; zero from `left` on. F: T, or float, which is rounded
// to T.
template <class T, class F>
__device__ void load_eight(uint32_t (&words)[4], const F* from, int64_t left, bool vector) {
  if constexpr (sizeof(F) == sizeof(T)) {
    if (vector && left >= 8) {
      const uint4 raw = load_once(from);
      words[0] = raw.x;
      words[1] = raw.y;
      words[2] = raw.z;
      words[3] = raw.w;
      return;
    }
  }
  T values[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = k < left ? rounded<T>(widen(from[k])) : rounded<T>(0.0f);
  memcpy(words, values, sizeof(values));
}

// sums += rows · tokensᵀ over steps `first`, `first + stride`, …, of `depth` columns: kRowTiles tiles of 16
// rows of a [rows, K], 8 kTokenTiles tokens of b [tokens, K] (in global or shared memory).
template <class T, class F, int kRowTiles, int kTokenTiles, int depth>
__device__ void small_product(float (&sums)[kRowTiles][kTokenTiles][4], const F* a, int64_t stride_a,
                              int64_t rows, const T* b, int64_t stride_b, int tokens, int64_t K,
                              int64_t first, int64_t end, int64_t stride, bool vector) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  for (int64_t step = first; step < end; step += stride) {
    uint32_t a_words[depth / 32][kRowTiles][2][4] = {}, b_words[depth / 32][kTokenTiles][4] = {};
#pragma unroll
    for (int part = 0; part < depth / 32; ++part) {
      const int64_t k = step * depth + part * 32 + quad * 8;
      if (k >= K) continue;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * i + 8 * half + group;
          if (row < rows) load_eight<T>(a_words[part][i][half], a + row * stride_a + k, K - k, vector);
        }
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + group;
        if (token >= tokens) continue;
        const uint4 raw = *reinterpret_cast<const uint4*>(b + token * stride_b + k);
        b_words[part][j][0] = raw.x;
        b_words[part][j][1] = raw.y;
        b_words[part][j][2] = raw.z;
        b_words[part][j][3] = raw.w;
      }
    }
#pragma unroll
    for (int part = 0; part < depth / 32; ++part) {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const auto& words = a_words[part][i];
          const uint32_t fragment[4] = {words[0][w], words[1][w], words[0][w + 1], words[1][w + 1]};
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j)
            multiply_add<T>(sums[i][j], fragment, b_words[part][j][w], b_words[part][j][w + 1]);
        }
      }
    }
  }
}

// The sums of all warps, in order: calls finish(row, token, sum) for each row of the block and each token.
template <int kRowTiles, int kTokenTiles, class Finish>
__device__ void sum_warps(const float (&sums)[kRowTiles][kTokenTiles][4], float* shared, Finish&& finish) {
  constexpr int kRows = 16 * kRowTiles, kStride = 8 * kTokenTiles + 1;
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared[(warp * kRows + 16 * i + e / 2 * 8 + group) * kStride + 8 * j + 2 * quad + e % 2] =
            sums[i][j][e];
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * 8 * kTokenTiles; at += kSmallThreads) {
    const int row = at % kRows, token = at / kRows;
    float sum = 0;
    for (int w = 0; w < kSmallWarps; ++w) sum += shared[(w * kRows + row) * kStride + token];
    finish(row, token, sum);
  }
}

template <int kRowTiles, int kTokenTiles>
constexpr size_t kSumMemory = kSmallWarps * 16 * kRowTiles * (8 * kTokenTiles + 1) * sizeof(float);

template <class T, class F, int kTokenTiles>
LORA_FAST_KERNEL(kSmallThreads, 2)
lora_project_small(SmallProject<T> op) {
  let_next_kernel_start();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 16, steps = divide_up(op.K, kProjectDepth);
  const int64_t per_split = divide_up(steps, gridDim.y), begin = blockIdx.y * per_split + threadIdx.x / 32;
  const int64_t end = (blockIdx.y + 1) * per_split < steps ? (blockIdx.y + 1) * per_split : steps;
  float sums[1][kTokenTiles][4] = {};
  small_product<T, F, 1, kTokenTiles, kProjectDepth>(sums, static_cast<const F*>(op.lora_A) + row * op.K,
                                                     op.K, op.R - row, op.x, op.K, op.tokens, op.K, begin,
                                                     end, kSmallWarps, true);
  float* partial = op.partial + blockIdx.y * op.tokens * op.R;
  sum_warps<1, kTokenTiles>(sums, reinterpret_cast<float*>(shared_memory()),
                            [&](int i, int token, float sum) {
                              if (row + i < op.R && token < op.tokens) partial[token * op.R + row + i] = sum;
                            });
}

// h in shared memory: a row's stride in elements, a multiple of 32 with zeros at the end, and 8 apart in the
// banks
__host__ __device__ inline int64_t stride_h(int64_t R) {
  return divide_up(R, 32) * 32 + 8;
}

template <class T, class F, int kRowTiles, int kTokenTiles, class Shape>
LORA_FAST_KERNEL(kSmallThreads, Shape::blocks)
lora_linear_small(SmallLinear<T> op) {
  constexpr int kRows = 16 * kRowTiles;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows, left = op.N - row;
  const int warp = threadIdx.x / 32;
  float sums[kRowTiles][kTokenTiles][4] = {};
  small_product<T, T, kRowTiles, kTokenTiles, Shape::depth>(
      sums, op.weight + row * op.stride_weight_n, op.stride_weight_n, left, op.x, op.K, op.tokens, op.K, warp,
      divide_up(op.K, Shape::depth), kSmallWarps, true);

  float* shared = reinterpret_cast<float*>(shared_memory());
  const auto inside = [&](int i, int token) { return i < left && token < op.tokens; };
  if (op.base != nullptr) {
    sum_warps<kRowTiles, kTokenTiles>(sums, shared, [&](int i, int token, float base) {
      if (inside(i, token)) op.base[token * op.N + row + i] = rounded<T>(base);
    });
  }

  wait_for_former_kernel();
  T* h = reinterpret_cast<T*>(shared_memory() + kSumMemory<kRowTiles, kTokenTiles>);
  const int64_t stride = stride_h(op.R);
  for (int64_t at = threadIdx.x; at < op.tokens * stride; at += kSmallThreads) {
    const int64_t token = at / stride, r = at % stride;
    float sum = 0;
    for (int split = 0; r < op.R && split < op.splits; ++split)
      sum += op.partial[(split * op.tokens + token) * op.R + r];
    h[at] = rounded<T>(sum);
    if (blockIdx.x == 0 && r < op.R) op.h[token * op.R + r] = h[at];
  }
  __syncthreads();
  float updates[kRowTiles][kTokenTiles][4] = {};
  small_product<T, F, kRowTiles, kTokenTiles, 32>(updates, static_cast<const F*>(op.lora_B) + row * op.R,
                                                  op.R, left, h, stride, op.tokens, op.R, warp,
                                                  divide_up(op.R, 32), kSmallWarps, op.R % 8 == 0);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] += op.scaling * updates[i][j][e];

  sum_warps<kRowTiles, kTokenTiles>(sums, shared, [&](int i, int token, float v) {
    if (!inside(i, token)) return;
    const int64_t n = row + i;
    const float bias = op.bias != nullptr ? element(op.bias, op.bias_dtype, n) : 0;
    op.y[token * op.N + n] = rounded<T>(gain_at(op.gain, n) * v + bias);
  });
}

// Splits of lora_project_small: enough blocks to share the reading, few partial sums to add up.
inline int64_t small_splits(int64_t K, int64_t R) {
  const int64_t steps = divide_up(K, kProjectDepth * kSmallWarps), wanted = divide_up(8, divide_up(R, 16));
  return steps < wanted ? steps : wanted;
}

template <class T, class F, int kTokenTiles, class Shape>
cudaError_t launch_small(const SmallProject<T>& project, const SmallLinear<T>& linear, cudaStream_t stream) {
  int multiprocessors = 0;
  if (const cudaError_t error = current_device(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  const cudaError_t error =
      launch(lora_project_small<T, F, kTokenTiles>, dim3(divide_up(linear.R, 16), linear.splits),
             kSmallThreads, kSumMemory<1, kTokenTiles>, false, stream, project);
  if (error != cudaSuccess) return error;
  // 32 rows a block read x half as often as 16, where they still give every multiprocessor a block
  const bool wide = Shape::most_rows == 32 && divide_up(linear.N, 32) * 10 >= 9 * multiprocessors;
  constexpr int kMostRowTiles = Shape::most_rows / 16;
  const auto kernel = wide ? lora_linear_small<T, F, kMostRowTiles, kTokenTiles, Shape>
                           : lora_linear_small<T, F, 1, kTokenTiles, Shape>;
  const size_t shared = (wide ? kSumMemory<2, kTokenTiles> : kSumMemory<1, kTokenTiles>)+linear.tokens *
                        stride_h(linear.R) * sizeof(T);
  const int64_t blocks = linear.N > 0 ? divide_up(linear.N, wide ? 32 : 16) : 1;  // the first one writes h
  return launch(kernel, dim3(blocks), kSmallThreads, shared, true, stream, linear);
}

// F: T or float, lora_A's and lora_B's type.
template <class T, class F, class Shape = BuiltSmallShape>
cudaError_t lora_linear_small_fwd(const SmallProject<T>& project, const SmallLinear<T>& linear,
                                  cudaStream_t stream) {
  return linear.tokens <= 8 ? launch_small<T, F, 1, Shape>(project, linear, stream)
                            : launch_small<T, F, 2, Shape>(project, linear, stream);
}

}  // namespace lora_fast::cuda
