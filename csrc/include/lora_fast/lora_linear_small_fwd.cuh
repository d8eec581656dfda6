// y = gain ⊙ (x Wᵀ + s h lora_Bᵀ) + bias, h = x lora_Aᵀ, for 1 to 16 tokens: the time is that of reading W
// once.
//
//   1. lora_project_small     partial sums of h, float32 [splits, T, padded_rank(R)]
//   2. lora_linear_small      W's rows, kSmallFlight bytes of them on their way in a multiprocessor at any
//                             time, into the tensor cores. On compute capability 9 and later this kernel
//                             starts while the first still runs, and waits for it when the last copies of W
//                             are on their way, so that h is added up while they come
//
// In a product a bᵀ over k the order of k is free as long as a and b share it: a lane reads eight adjacent k
// of a row and distributes them over two multiplications.
#pragma once

#include <lora_fast/gain.cuh>

#include <algorithm>

namespace lora_fast::cuda {

constexpr int kSmallThreads = 256, kSmallWarps = kSmallThreads / 32;
constexpr int kSmallTokens = 16;
constexpr int kProjectDepth = 128;  // k of one step of a warp: at K = 4096 four splits have one step each
constexpr int kProjectRows = 16;    // of lora_A in a block
constexpr int kMostSplits = 4;      // of h, in partial sums that every block adds up
constexpr int kRankDepth = 32;      // ranks of one step of a warp

// Of W: on 132 multiprocessors of 4.3 TB/s, 4 times what a latency of 0.7 µs needs (predicted). Every GPU of
// compute capability 8.0 or later has as much shared memory.
constexpr int kSmallFlight = 96 << 10;

// What lora_linear_small is made for: rows of W in a block at most, 16 or 32; k of one step of a warp; blocks
// that share kSmallFlight. setup.py takes them from triton_kernels/constants.json, where they were measured.
// Predicted: 32 rows read x half as often as 16, and at N = 4096 are one block for each of 128
// multiprocessors; a step of 64 has whole lines of 128 bytes.
#ifndef LORA_FAST_SMALL_ROWS
#define LORA_FAST_SMALL_ROWS 32
#define LORA_FAST_SMALL_DEPTH 64
#define LORA_FAST_SMALL_BLOCKS 1
#endif
template <int kMostRows, int kDepth, int kBlocks>
struct SmallShape {
  static constexpr int most_rows = kMostRows, depth = kDepth, blocks = kBlocks;
};
using BuiltSmallShape = SmallShape<LORA_FAST_SMALL_ROWS, LORA_FAST_SMALL_DEPTH, LORA_FAST_SMALL_BLOCKS>;

// The partial sums of h in whole vectors.
__host__ __device__ inline int64_t padded_rank(int64_t R) {
  return divide_up(R, kProjectRows) * kProjectRows;
}

template <class T>
struct SmallProject {
  const T* x;  // [tokens, K], contiguous, K a multiple of 8
  const void* lora_A;
  int tokens;
  int64_t K, R;
  float* partial;  // [splits, tokens, padded_rank(R)], zero beyond R
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

// This thread among its warp: of the rows of a, and the tokens, it has every eighth from `group` on, of 32
// columns the eight from 8 `quad` on.
struct Lane {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
};

// The bits of eight adjacent elements, into zeros; zero from `left` on, which is at least one.
template <class F>
__device__ void load_eight(uint32_t (&words)[2 * sizeof(F)], const F* from, int64_t left, bool vector) {
  if (vector) {
    uint4 raw[sizeof(F) / 2];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(F) / 2); ++i) raw[i] = load_once(from + i * Vector<F>::kSize);
    memcpy(words, raw, sizeof(words));
  } else {
    F values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = from[k < left ? k : 0];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t bits = 0;
      memcpy(&bits, &values[k], sizeof(F));
      constexpr int kInWord = 4 / sizeof(F);
      words[k / kInWord] |= (k < left ? bits : 0) << (k % kInWord * 16);
    }
  }
}

// As T's bits, two elements in a word: 32 columns from k on of 16 kRowTiles rows of a [rows, K]. `vector`: K
// is a multiple of 8. F: T, or float, which is rounded to T when all loads are on their way.
template <class T, int kRowTiles, class F>
__device__ void load_rows(uint32_t (&words)[kRowTiles][2][4], const F* a, int64_t stride, int64_t rows,
                          int64_t k, int64_t K, bool vector) {
  const Lane at;
  k += 8 * at.quad;
  uint32_t given[kRowTiles][2][2 * sizeof(F)] = {};
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * i + 8 * half + at.group;
      if (row < rows && k < K) load_eight(given[i][half], a + row * stride + k, K - k, vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (std::is_same_v<T, F>) {
        memcpy(words[i][half], given[i][half], sizeof(words[i][half]));
      } else {
        F wide[8];
        T values[8];
        memcpy(wide, given[i][half], sizeof(wide));
#pragma unroll
        for (int e = 0; e < 8; ++e) values[e] = rounded<T>(wide[e]);
        memcpy(words[i][half], values, sizeof(values));
      }
    }
  }
}

// The same of x [tokens, K].
template <int kTokenTiles, class T>
__device__ void load_tokens(uint32_t (&words)[kTokenTiles][4], const T* x, int tokens, int64_t k, int64_t K) {
  const Lane at;
  k += 8 * at.quad;
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = 8 * j + at.group;
    uint4 raw{};
    if (token < tokens && k < K) raw = *reinterpret_cast<const uint4*>(x + token * K + k);
    memcpy(words[j], &raw, sizeof(raw));
  }
}

// The same of h [tokens, R], made of its partial sums in their order. The loads of two splits are on their
// way together: four would not fit into the registers. The first block writes h.
template <int kTokenTiles, class T>
__device__ void load_h(uint32_t (&words)[kTokenTiles][4], const SmallLinear<T>& op, int64_t r) {
  const Lane at;
  const int64_t stride = padded_rank(op.R);
  r += 8 * at.quad;
  float sums[kTokenTiles][8] = {};
#pragma unroll 1
  for (int split = 0; split < op.splits; split += 2) {
    Vector<float> parts[kTokenTiles][2][2] = {};
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int token = 8 * j + at.group;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float* from = op.partial + ((split + s) * op.tokens + token) * stride + r;
        if (token < op.tokens && r < stride && split + s < op.splits) {
          parts[j][s][0] = load_vector(from);
          parts[j][s][1] = load_vector(from + 4);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        for (int s = 0; s < 2; ++s) sums[j][e] += parts[j][s][e / 4].at[e % 4];
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = 8 * j + at.group;
    T h[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      h[e] = rounded<T>(sums[j][e]);
      if (blockIdx.x == 0 && token < op.tokens && r + e < op.R) op.h[token * op.R + r + e] = h[e];
    }
    memcpy(words[j], h, sizeof(h));
  }
}

// sums += rows · tokensᵀ over 32 columns.
template <class T, int kRowTiles, int kTokenTiles>
__device__ void multiply(float (&sums)[kRowTiles][kTokenTiles][4], const uint32_t (&rows)[kRowTiles][2][4],
                         const uint32_t (&tokens)[kTokenTiles][4]) {
#pragma unroll
  for (int w = 0; w < 4; w += 2) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const uint32_t fragment[4] = {rows[i][0][w], rows[i][1][w], rows[i][0][w + 1], rows[i][1][w + 1]};
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j)
        multiply_add<T>(sums[i][j], fragment, tokens[j][w], tokens[j][w + 1]);
    }
  }
}

// A warp's sums in shared memory, [16 kRowTiles, 8 kTokenTiles], without bank conflicts.
template <int kRowTiles, int kTokenTiles>
struct SmallSums {
  static constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles, kStride = kTokens + 1;
  static constexpr int kBytes = kRows * kStride * sizeof(float);

  static __device__ void store(char* to, const float (&sums)[kRowTiles][kTokenTiles][4]) {
    const Lane at;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          reinterpret_cast<float*>(
              to)[(16 * i + e / 2 * 8 + at.group) * kStride + 8 * j + 2 * at.quad + e % 2] = sums[i][j][e];
  }

  // Over all warps in their order, each `bytes` after the one before it.
  static __device__ float total(const char* from, int bytes, int row, int token) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kSmallWarps; ++warp)
      sum += reinterpret_cast<const float*>(from + warp * bytes)[row * kStride + token];
    return sum;
  }
};

template <class T, class F, int kTokenTiles>
LORA_FAST_KERNEL(kSmallThreads, 2)
lora_project_small(SmallProject<T> op) {
  let_next_kernel_start();
  using Sums = SmallSums<kProjectRows / 16, kTokenTiles>;
  const Lane at;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kProjectRows;
  const int64_t steps = divide_up(op.K, kProjectDepth), stride = padded_rank(op.R);
  const int64_t per_split = divide_up(steps, gridDim.y), begin = blockIdx.y * per_split;
  const int64_t end = begin + per_split < steps ? begin + per_split : steps;
  float sums[1][kTokenTiles][4] = {};
  for (int64_t step = begin + at.warp; step < end; step += kSmallWarps) {
    constexpr int kParts = kProjectDepth / 32;
    uint32_t rows[kParts][1][2][4], tokens[kParts][kTokenTiles][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int64_t k = step * kProjectDepth + part * 32;
      load_rows<T>(rows[part], static_cast<const F*>(op.lora_A) + row * op.K, op.K, op.R - row, k, op.K,
                   true);
      load_tokens(tokens[part], op.x, op.tokens, k, op.K);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) multiply<T>(sums, rows[part], tokens[part]);
  }
  char* shared = shared_memory();
  Sums::store(shared + at.warp * Sums::kBytes, sums);
  __syncthreads();
  float* partial = op.partial + blockIdx.y * op.tokens * stride + row;
  for (int i = threadIdx.x; i < Sums::kRows * op.tokens; i += kSmallThreads) {
    const int r = i % Sums::kRows, token = i / Sums::kRows;
    partial[token * stride + r] = Sums::total(shared, Sums::kBytes, r, token);
  }
}

// The steps of W that a warp has on their way, in shared memory. A lane reads what it has copied itself, and
// there is no barrier.
template <class Shape, int kRowTiles>
struct SmallRing {
  static constexpr int kParts = Shape::depth / 32;
  static constexpr int kStepBytes = kParts * kRowTiles * 2 * 32 * 16;
  static constexpr int kSteps = kSmallFlight / Shape::blocks / kSmallWarps / kStepBytes;
  static constexpr int kBytes = kSteps * kStepBytes;
  static_assert(kSteps >= 2, "W's next step must be on its way while one is multiplied");

  // A lane's 16 bytes of row 16 i + 8 half + group in step n.
  static __device__ char* slot(int n, int part, int i, int half) {
    const Lane at;
    const int line = ((n % kSteps * kParts + part) * kRowTiles + i) * 2 + half;
    return shared_memory() + at.warp * kBytes + (line * 32 + at.lane) * 16;
  }
};

// From compute capability 9.0 on two blocks of kSmallFlight fit on a multiprocessor, where there are as many:
// one reads W while the other starts or finishes.
template <class T, class F, int kRowTiles, int kTokenTiles, class Shape>
LORA_FAST_KERNEL(kSmallThreads, 2)
lora_linear_small(SmallLinear<T> op) {
  using Ring = SmallRing<Shape, kRowTiles>;
  using Sums = SmallSums<kRowTiles, kTokenTiles>;
  const Lane at;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Sums::kRows, left = op.N - row;
  // of this warp; step n has the columns from column(n, 0) on
  const int steps = static_cast<int>(divide_up(divide_up(op.K, Shape::depth) - at.warp, kSmallWarps));
  const auto column = [&](int n, int part) {
    return (static_cast<int64_t>(n) * kSmallWarps + at.warp) * Shape::depth + part * 32;
  };
  const T* lines = op.weight + (row + at.group) * op.stride_weight_n + 8 * at.quad;
  const auto copy_weight = [&](int n) {
#pragma unroll
    for (int part = 0; part < Ring::kParts && n < steps; ++part) {
      const int64_t k = column(n, part);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int line = 16 * i + 8 * half;
          const bool inside = line + at.group < left && k + 8 * at.quad < op.K;
          copy_async_16(Ring::slot(n, part, i, half), lines + line * op.stride_weight_n + k, inside ? 16 : 0);
        }
      }
    }
    commit_copies();
  };
  using Tokens = uint32_t[Ring::kParts][kTokenTiles][4];
  const auto load_x = [&](Tokens& words, int n) {
#pragma unroll
    for (int part = 0; part < Ring::kParts; ++part)
      load_tokens(words[part], op.x, op.tokens, column(n, part), op.K);
  };
  const F* lora_B = static_cast<const F*>(op.lora_B) + row * op.R;
  const auto load_B = [&](uint32_t (&words)[kRowTiles][2][4], int64_t r) {
    load_rows<T>(words, lora_B, op.R, left, r, op.R, op.R % 8 == 0);
  };

#pragma unroll 1
  for (int n = 0; n < Ring::kSteps; ++n) copy_weight(n);
  // Their latencies pass behind W's too. The kernel in front of lora_project_small, which may have made the
  // norm, has ended: lora_project_small did not start before.
  Tokens tokens;
  load_x(tokens, 0);
  uint32_t rows_B[kRowTiles][2][4];
  load_B(rows_B, kRankDepth * at.warp);
  static_assert(kSmallThreads % Sums::kRows == 0, "a thread finishes one row");
  const int64_t output = row + threadIdx.x % Sums::kRows;
  const bool has_output = output < op.N;
  const float gain = has_output ? gain_at(op.gain, output) : 0;
  const float bias = has_output && op.bias != nullptr ? element(op.bias, op.bias_dtype, output) : 0;

  float sums[kRowTiles][kTokenTiles][4] = {}, updates[kRowTiles][kTokenTiles][4] = {};
  int n = 0;
  const auto multiply_until = [&](int end) {
    for (; n < end; ++n) {
      wait_for_copies<Ring::kSteps - 1>();
#pragma unroll
      for (int part = 0; part < Ring::kParts; ++part) {
        uint32_t rows[kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            memcpy(rows[i][half], Ring::slot(n, part, i, half), sizeof(rows[i][half]));
        multiply<T>(sums, rows, tokens[part]);
      }
      // over what has been multiplied; x comes from L2 while the next step of W is waited for
      load_x(tokens, n + 1);
      copy_weight(n + Ring::kSteps);
    }
  };
  multiply_until(steps - Ring::kSteps);
  wait_for_former_kernel();
  for (int64_t r = kRankDepth * at.warp; r < op.R; r += kRankDepth * kSmallWarps) {
    uint32_t tokens_h[kTokenTiles][4];
    load_h(tokens_h, op, r);
    multiply<T>(updates, rows_B, tokens_h);
    load_B(rows_B, r + kRankDepth * kSmallWarps);
  }
  multiply_until(steps);

  // Over the warp's own part of the ring: its last multiplication came after the last read of each lane.
  char *shared = shared_memory(), *own = shared + at.warp * Ring::kBytes;
  static_assert(2 * Sums::kBytes <= Ring::kBytes);
  if (op.base != nullptr) Sums::store(own + Sums::kBytes, sums);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] += op.scaling * updates[i][j][e];
  Sums::store(own, sums);
  __syncthreads();
  constexpr int kTogether = kSmallThreads / Sums::kRows;
  for (int token = threadIdx.x / Sums::kRows; has_output && token < op.tokens; token += kTogether) {
    const int line = threadIdx.x % Sums::kRows;
    const int64_t to = token * op.N + output;
    if (op.base != nullptr)
      op.base[to] = rounded<T>(Sums::total(shared + Sums::kBytes, Ring::kBytes, line, token));
    op.y[to] = rounded<T>(gain * Sums::total(shared, Ring::kBytes, line, token) + bias);
  }
}

// Splits of lora_project_small: up to 16 blocks share the reading, and up to rank 256 a block of
// lora_linear_small reads 16 KB of partial sums at most.
inline int64_t small_splits(int64_t K, int64_t R) {
  const int64_t steps = divide_up(K, kProjectDepth * kSmallWarps);
  const int64_t wanted = std::max<int64_t>(1, 16 / divide_up(R, kProjectRows));
  return std::min({steps, wanted, int64_t{kMostSplits}});
}

template <class T, class F, int kTokenTiles, class Shape>
cudaError_t launch_small(const SmallProject<T>& project, const SmallLinear<T>& linear, cudaStream_t stream) {
  int multiprocessors = 0;
  if (const cudaError_t error = current_device(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  const cudaError_t error =
      launch(lora_project_small<T, F, kTokenTiles>, dim3(divide_up(linear.R, kProjectRows), linear.splits),
             kSmallThreads, kSmallWarps * SmallSums<1, kTokenTiles>::kBytes, false, stream, project);
  if (error != cudaSuccess) return error;
  // 32 rows a block read x half as often as 16, where they still give every multiprocessor a block
  const bool wide = Shape::most_rows == 32 && divide_up(linear.N, 32) * 10 >= 9 * multiprocessors;
  constexpr int kMostRowTiles = Shape::most_rows / 16;
  const auto kernel = wide ? lora_linear_small<T, F, kMostRowTiles, kTokenTiles, Shape>
                           : lora_linear_small<T, F, 1, kTokenTiles, Shape>;
  const size_t shared =
      kSmallWarps * (wide ? SmallRing<Shape, kMostRowTiles>::kBytes : SmallRing<Shape, 1>::kBytes);
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
