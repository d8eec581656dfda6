// out = x / (1 - p) where kept, 0 elsewhere; what is kept depends on seed, row and column alone.
#include "../include/lora_fast/dropout_mask.h"
#include "ops.h"
#include "parallel.h"
#include "rank_tile.h"

namespace lora_fast {
namespace {

struct Dropout {
  const void* x;
  void* out;
  ScalarType dtype;
  int64_t rows, cols;
  uint64_t seed;
  uint32_t threshold;
  double scale;
};

// x where the columns k are kept, 0 elsewhere
template <class F>
LORA_FAST_INLINE Vec<F> drop(Vec<F> x, u32x16 k, const RowMask& mask, uint32_t threshold) {
  const u32x16 word = mask.word(k);
  if constexpr (sizeof(F) == 8) {
    using u64x16 = uint64_t __attribute__((vector_size(128)));
    return __builtin_convertvector(word, u64x16) >= threshold ? x : Vec<F>{};
  } else {
    return word >= threshold ? x : Vec<F>{};
  }
}

template <class F, class T>
LORA_FAST_INLINE void drop_row(const Dropout& op, int64_t row) {
  const T* x = static_cast<const T*>(op.x) + row * op.cols;
  T* out = static_cast<T*>(op.out) + row * op.cols;
  const Vec<F> scale = splat(static_cast<F>(op.scale));
  const RowMask mask(op.seed, static_cast<uint64_t>(row));
  u32x16 even = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, odd = even + kLanes;
  if (kDealt<T>) {
    even *= 2;
    odd = even + 1;
  }
  for (int64_t k = 0; k < op.cols; k += kStrip) {
    const uint32_t first = static_cast<uint32_t>(k);
    const Strip<F> in = load_strip_n<F>(x + k, op.cols - k);
    store_strip_n<F>(out + k,
                     {drop<F>(in.even * scale, even + first, mask, op.threshold),
                      drop<F>(in.odd * scale, odd + first, mask, op.threshold)},
                     op.cols - k);
  }
}

LORA_FAST_CLONES void drop_rows(const Dropout& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    LORA_FAST_BY_DTYPE(op.dtype, T, drop_row<Compute<T>, T>(op, row))
  }
}

}  // namespace

Tensor cpu::dropout(Tensor x, Tensor seed, double p) {
  check_matrix(x, "x");
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed must be one int64 on the CPU");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must be in [0, 1], got ", p);
  const Tensor in = torch::stable::contiguous(x);
  const int64_t size[] = {x.size(0), x.size(1)};
  Tensor out = torch::stable::new_empty(x, {size, 2});
  if (p == 1) return torch::stable::zero_(out);
  Dropout op{in.const_data_ptr(),
             out.mutable_data_ptr(),
             x.scalar_type(),
             size[0],
             size[1],
             static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
             dropout_threshold(p),
             1 / (1 - p)};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, op.cols));
  for_chunks(chunk_count(op.rows, grain), op.rows,
             [&](int64_t, int64_t begin, int64_t end) { drop_rows(op, begin, end); });
  return out;
}

}  // namespace lora_fast
