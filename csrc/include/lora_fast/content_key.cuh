// The key of a kept norm, hashed and compared on the device: all bits of lora_A and lora_B and a sample of W,
// in two sums of 64-bit hashes of words with their positions; the rest of the key is the host's.
//
//   1. content_key_kernel  partial sums of each block, and a copy of the kept key
//   2. begin_kept          in every block of the kernel that computes: adds them, compares with the copy
//   3. finish_kept         in the kernel after that: the last block to come writes the key
//
// Another stream may write the kept key at any time; with the copy all blocks of a kernel decide alike.
#pragma once

#include <lora_fast/element.cuh>

namespace lora_fast::cuda {

constexpr int kKeyLength = 6, kKeyHashes = 2;
constexpr int kKeySamples = 2048;
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
  uint64_t host_key[kKeyLength - kKeyHashes];
  const uint64_t* hashes;  // [blocks, kKeyHashes]
  int64_t blocks;
  KeptState* state;
};

// A matrix's bits. `vector`: all of it adjacent, in whole 16-byte words.
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

// Both halves of the 128-bit product: every bit of a and b reaches every bit of the result.
__device__ inline uint64_t fold(uint64_t a, uint64_t b) {
  return a * b ^ __umul64hi(a, b);
}

__device__ inline uint64_t hash_word(uint64_t low, uint64_t high, uint64_t position) {
  return fold(low ^ (2 * position + 1) * 0x9E3779B97F4A7C15u,
              high ^ (2 * position + 1) * 0xD1B54A32D192ED03u);
}

__device__ inline uint64_t bits_at(const Bits& bits, int64_t row, int64_t col) {
  const int64_t at = row * bits.row_stride + col * bits.col_stride;
  return bits.width == 2 ? static_cast<const uint16_t*>(bits.data)[at]
                         : static_cast<const uint32_t*>(bits.data)[at];
}

// This thread's part of the hash of all elements, their positions counted from `start`.
__device__ inline uint64_t hash_bits(const Bits& bits, uint64_t start) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kKeyThreads;
  uint64_t hash = 0;
  if (bits.vector) {
    const int64_t words = bits.rows * bits.cols * bits.width / 16;
    for (int64_t at = thread; at < words; at += threads) {
      const uint4 word = static_cast<const uint4*>(bits.data)[at];
      hash += hash_word(static_cast<uint64_t>(word.y) << 32 | word.x,
                        static_cast<uint64_t>(word.w) << 32 | word.z, start + at);
    }
    return hash;
  }
  for (int64_t at = thread; at < bits.rows * bits.cols; at += threads)
    hash += hash_word(bits_at(bits, at / bits.cols, at % bits.cols), 0x8CB92BA72F3D8DD7u, start + at);
  return hash;
}

// Rows in order and evenly, columns by the golden ratio: every stretch of rows and of columns has its share.
__device__ inline uint64_t hash_sample(const Bits& bits) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kKeyThreads;
  const bool all = bits.rows * bits.cols <= kKeySamples;
  const int64_t count = all ? bits.rows * bits.cols : kKeySamples;
  uint64_t hash = 0;
  for (int64_t at = thread; at < count; at += threads) {
    const int64_t row = all ? at / bits.cols : (2 * at + 1) * bits.rows / (2 * kKeySamples);
    const int64_t col = all ? at % bits.cols
                            : static_cast<int64_t>(__umul64hi(0x9E3779B97F4A7C15u * static_cast<uint64_t>(at),
                                                              static_cast<uint64_t>(bits.cols)));
    hash += hash_word(bits_at(bits, row, col), 0x8CB92BA72F3D8DD7u, at);
  }
  return hash;
}

static LORA_FAST_KERNEL(kKeyThreads, 2) content_key_kernel(ContentKey op) {
  uint64_t* shared = reinterpret_cast<uint64_t*>(shared_memory());
  constexpr uint64_t kApart = uint64_t{1} << 48;  // lora_B's positions, from lora_A's
  const uint64_t factors =
      sum_of_block(hash_bits(op.lora_A, 0) + hash_bits(op.lora_B, kApart), shared, kKeyThreads);
  const uint64_t sample = sum_of_block(hash_sample(op.weight), shared, kKeyThreads);
  if (threadIdx.x == 0) {
    op.hashes[kKeyHashes * blockIdx.x] = factors;
    op.hashes[kKeyHashes * blockIdx.x + 1] = sample;
  }
  if (blockIdx.x == 0 && threadIdx.x < kKeyLength) op.state->former[threadIdx.x] = op.kept_key[threadIdx.x];
}

inline int64_t content_key_blocks(int64_t factor_bytes) {
  const int64_t blocks = divide_up(factor_bytes, 16 * kKeyThreads);
  return blocks < 1 ? 1 : blocks < kKeyBlocks ? blocks : kKeyBlocks;
}

inline cudaError_t content_key(const ContentKey& op, int64_t blocks, cudaStream_t stream) {
  return launch(content_key_kernel, dim3(blocks), kKeyThreads, kKeyThreads / 32 * sizeof(uint64_t), false,
                stream, op);
}

// Whether the key differs from the former one; by a whole block of `threads`, at the beginning of a kernel.
__device__ inline bool begin_kept(const Kept& kept, int threads) {
  uint64_t* shared = reinterpret_cast<uint64_t*>(shared_memory());
  uint64_t key[kKeyLength] = {};
  for (int64_t block = threadIdx.x; block < kept.blocks; block += threads)
    for (int k = 0; k < kKeyHashes; ++k) key[k] += kept.hashes[kKeyHashes * block + k];
  for (int k = 0; k < kKeyHashes; ++k) key[k] = sum_of_block(key[k], shared, threads);
  for (int k = kKeyHashes; k < kKeyLength; ++k) key[k] = kept.host_key[k - kKeyHashes];
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
