// The key of a kept norm, as lora_fast/content_key.py defines it, hashed and compared on the device.
//
//   1. content_key_kernel  partial sums of each block, and a copy of the kept key
//   2. begin_kept          in every block of the kernel that computes: adds them, compares with the copy
//   3. finish_kept         in the kernel after that: the last block to come writes the key
//
// Another stream may write the kept key at any time; with the copy all blocks of a kernel decide alike.
#pragma once

#include <lora_fast/content_hash.h>

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

constexpr int kKeyThreads = 256;
constexpr int64_t kKeyBlocks = 128;  // at most: every block of the norm adds them up

// What the two kernels after content_key_kernel share; in memory that lives as long as they.
struct KeptState {
  uint64_t former[kKeyLength], key[kKeyLength];  // as kept before, and of this content
  unsigned changed, finished;
};

struct Kept {
  float* norm;    // null: nothing is kept
  uint64_t* key;  // [kKeyLength]
  uint64_t host_key;
  const uint64_t* hashes;  // [blocks, kKeyHashes]
  int64_t blocks;
  KeptState* state;
};

// A matrix's bits. `vector`: all of it adjacent and aligned, in whole words.
struct Bits {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
  int width;  // bytes of an element
  bool vector;
};

struct ContentKey {
  Bits weight, lora_A, lora_B;
  const uint64_t* kept_key;
  KeptState* state;
  uint64_t* hashes;  // [gridDim.x, kKeyHashes]
};

__device__ inline uint64_t bits_at(const Bits& bits, int64_t row, int64_t col) {
  const int64_t at = row * bits.row_stride + col * bits.col_stride;
  return bits.width == 2 ? static_cast<const uint16_t*>(bits.data)[at]
                         : static_cast<const uint32_t*>(bits.data)[at];
}

// This thread's part of the hash of all words, their positions counted from `start`.
__device__ inline uint64_t hash_factor(const Bits& bits, uint64_t start) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kKeyThreads;
  const int64_t elements = bits.rows * bits.cols;
  uint64_t hash = 0;
  for (int64_t word = thread; word < divide_up(elements * bits.width, kWordBytes); word += threads) {
    uint64_t low = 0, high = 0;
    if (bits.vector) {
      const uint4 whole = static_cast<const uint4*>(bits.data)[word];
      low = static_cast<uint64_t>(whole.y) << 32 | whole.x;
      high = static_cast<uint64_t>(whole.w) << 32 | whole.z;
    } else {
      const int in_half = 8 / bits.width;
      const int64_t first = word * 2 * in_half;
      int64_t row = first / bits.cols, col = first % bits.cols;
      for (int k = 0; k < 2 * in_half && row < bits.rows; ++k) {
        (k < in_half ? low : high) |= bits_at(bits, row, col) << k % in_half * 8 * bits.width;
        if (++col == bits.cols) {
          col = 0;
          ++row;
        }
      }
    }
    hash += hash_word(low, high, start + word);
  }
  return hash;
}

__device__ inline uint64_t hash_sample(const Bits& bits) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kKeyThreads;
  const Sampling sampling(bits.rows, bits.cols);
  uint64_t hash = 0;
  for (int64_t q = thread; q < sampling.count(); q += threads)
    hash += hash_word(bits_at(bits, sampling.row(q), sampling.col(q)), kLoneHigh, q);
  return hash;
}

template <int kThreads>
LORA_FAST_KERNEL(kThreads, 2)
content_key_kernel(ContentKey op) {
  uint64_t* shared = reinterpret_cast<uint64_t*>(shared_memory());
  const uint64_t factors =
      sum_of_block(hash_factor(op.lora_A, 0) + hash_factor(op.lora_B, kLoraBPosition), shared, kKeyThreads);
  const uint64_t sample = sum_of_block(hash_sample(op.weight), shared, kKeyThreads);
  if (threadIdx.x == 0) {
    op.hashes[kKeyHashes * blockIdx.x] = factors;
    op.hashes[kKeyHashes * blockIdx.x + 1] = sample;
  }
  if (blockIdx.x == 0 && threadIdx.x < kKeyLength) op.state->former[threadIdx.x] = op.kept_key[threadIdx.x];
}

inline int64_t content_key_blocks(int64_t factor_bytes) {
  const int64_t blocks = divide_up(factor_bytes, kWordBytes * kKeyThreads);
  return blocks < 1 ? 1 : blocks < kKeyBlocks ? blocks : kKeyBlocks;
}

inline cudaError_t content_key(const ContentKey& op, int64_t blocks, cudaStream_t stream) {
  return launch(content_key_kernel<kKeyThreads>, dim3(blocks), kKeyThreads,
                kKeyThreads / 32 * sizeof(uint64_t), false, stream, op);
}

// Whether the key differs from the former one; by a whole block of `threads`, at the beginning of a kernel.
__device__ inline bool begin_kept(const Kept& kept, int threads) {
  uint64_t* shared = reinterpret_cast<uint64_t*>(shared_memory());
  uint64_t key[kKeyLength] = {};
  for (int64_t block = threadIdx.x; block < kept.blocks; block += threads)
    for (int k = 0; k < kKeyHashes; ++k) key[k] += kept.hashes[kKeyHashes * block + k];
  for (int k = 0; k < kKeyHashes; ++k) key[k] = sum_of_block(key[k], shared, threads);
  key[kKeyHashes] = kept.host_key;
  bool changed = false;
  for (int k = 0; k < kKeyLength; ++k) changed |= key[k] != kept.state->former[k];
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    for (int k = 0; k < kKeyLength; ++k) kept.state->key[k] = key[k];
    kept.state->changed = changed;
    kept.state->finished = 0;
  }
  __syncthreads();  // shared memory is free again
  return changed;
}

// Writes the key when all blocks of this kernel have written their norms.
__device__ inline void finish_kept(const Kept& kept) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&kept.state->finished, 1u) == gridDim.x - 1) {
    __threadfence();
    for (int k = 0; k < kKeyLength; ++k) kept.key[k] = kept.state->key[k];
  }
}

}  // namespace lora_fast::cuda
