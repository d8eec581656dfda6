// h[t] = lora_A[a] x[t], a being the adapter of row t: a group's rows meet its lora_A, 32 by 32, in the
// products of few_tokens.h. A sum does not depend on where its row stands, nor on the other rows of its
// group's size.
#include "amx_product.h"
#include "few_tokens.h"
#include "grouped.h"
#include "lora_linear_common.h"
#include "ops.h"

namespace lora_fast {
namespace {

struct Project {
  const void* x;  // [rows, K], contiguous
  void* h;        // [rows, R], zeros
  int64_t K, R;
  const RowGroups* groups;
  const GroupedFactor* lora_A;
};

// A line of a factor, rounded to T, and zeros up to the length.
template <class T>
LORA_FAST_CLONES void copy_factor_line(const Factor& f, int64_t row, int64_t count, int64_t length, T* out) {
  LORA_FAST_BY_DTYPE(
      f.dtype, In,
      convert_line(out, static_cast<const In*>(f.data) + row * f.stride_rank, f.stride_outer, count))
  std::fill(out + count, out + length, T{});
}

template <class T>
LORA_FAST_CLONES void store_rounded(const float* c, int64_t rows, int64_t R, const int64_t* order,
                                    int64_t tokens, T* h) {
  for (int64_t i = 0; i < rows; ++i) {
    alignas(64) T rounded[kSmallTokens];
    for (int64_t t = 0; t < kSmallTokens; t += kLanes)
      store<float>(rounded + t, load<float>(c + i * kSmallTokens + t));
    for (int64_t t = 0; t < tokens; ++t) h[order[t] * R + i] = rounded[t];
  }
}

// One thread's room, and how it computes.
template <class T>
class Worker {
 public:
  explicit Worker(const Project& op)
      : op_(op),
        depth_(round_up(op.K, kSmallDepth)),
        columns_(kSmallTokens * depth_ * static_cast<int64_t>(sizeof(float))),
        lines_(kSmallRows * depth_),
        room_(dot_room(kSmallRows, kSmallTokens)) {}

  // Rows [task.begin, task.end) with rows [task.first, task.last) of lora_A, at most 32 each.
  void run(const GroupTask& task) {
    const int64_t tokens = task.end - task.begin,
                  rows = std::min(task.last, op_.lora_A->rank(task.adapter)) - task.first;
    if (rows <= 0) return;
    // tiles of AMX are worth their packing from some rows on; the choice is the group's, not the task's
    const bool many = op_.groups->end(task.adapter) - op_.groups->begin(task.adapter) > kFewest;
    const bool in_tiles = products_of<T>() == Products::tiles && many;
    alignas(64) float c[kSmallRows * kSmallTokens] = {};
    const T* matrix = rows_of(task, rows, in_tiles ? kSmallRows : round_up(rows, kDotRows));
    const int64_t ld = matrix == lines_.data() ? depth_ : op_.lora_A->at(task.adapter).stride_rank;
    const int64_t* order = op_.groups->order() + task.begin;
    if (in_tiles) {
      multiply_tiles(order, tokens, matrix, ld, c);
    } else if (products_of<T>() == Products::pairs) {
      multiply<T>(order, tokens, matrix, ld, round_up(rows, kDotRows), c);
    } else {
      multiply<float>(order, tokens, matrix, ld, round_up(rows, kDotRows), c);
    }
    store_rounded(c, rows, op_.R, order, tokens, static_cast<T*>(op_.h) + task.first);
  }

 private:
  // `count` rows of lora_A from task.first on, of which `rows` are there: in place where they are all and as
  // T
  const T* rows_of(const GroupTask& task, int64_t rows, int64_t count) {
    const Factor& f = op_.lora_A->at(task.adapter);
    const bool as_they_are = std::is_same_v<T, float>  ? f.dtype == ScalarType::Float
                             : std::is_same_v<T, bf16> ? f.dtype == ScalarType::BFloat16
                                                       : f.dtype == ScalarType::Half;
    if (as_they_are && count == rows && f.stride_outer == 1 && depth_ == op_.K)
      return static_cast<const T*>(f.data) + task.first * f.stride_rank;
    for (int64_t i = 0; i < rows; ++i)
      copy_factor_line(f, task.first + i, op_.K, depth_, lines_.data() + i * depth_);
    std::fill(lines_.data() + rows * depth_, lines_.data() + count * depth_, T{});
    return lines_.data();
  }

  // The place of x's columns is that of 32, so that a sum is made in the same stretches whatever their
  // number.
  template <class Element>
  void multiply(const int64_t* order, int64_t tokens, const T* matrix, int64_t ld, int64_t rows, float* c) {
    Element* columns = static_cast<Element*>(static_cast<void*>(columns_.data()));
    const int64_t stretch = dot_stretch<Element>(kSmallTokens);
    for (int64_t k = 0; k < depth_; k += stretch) {
      const int64_t length = std::min(stretch, depth_ - k);
      for (int64_t t = 0; t < tokens; ++t) pack(order[t], k, length, columns + k * kSmallTokens + t * length);
    }
    dot_forward(matrix, ld, rows, {columns, kSmallTokens, tokens, depth_}, c, kSmallTokens, nullptr,
                room_.data());
  }

  template <class Element>
  void pack(int64_t row, int64_t k, int64_t length, Element* out) {
    const T* x = static_cast<const T*>(op_.x) + row * op_.K + k;
    alignas(64) T padded[kStrip];
    const int64_t whole = std::min(length, (op_.K - k) / kStrip * kStrip);
    pack_whole(x, whole, out);
    if (whole == length) return;
    std::fill(padded, padded + kStrip, T{});
    std::copy_n(x + whole, op_.K - k - whole, padded);
    pack_whole(padded, kStrip, out + whole);
  }

  template <class Element>
  static void pack_whole(const T* x, int64_t count, Element* out) {
    if constexpr (std::is_same_v<T, Element>) {
      std::copy_n(x, count, out);
    } else {
      widen_strips(x, count, out);
    }
  }

  void multiply_tiles(const int64_t* order, int64_t tokens, const T* matrix, int64_t ld, float* c) {
    if constexpr (std::is_same_v<T, bf16>) {
      const int64_t tiles = round_up(tokens, kTokenTile) / kTokenTile, size = kTokenTile * kSmallDepth;
      bf16* packed = static_cast<bf16*>(static_cast<void*>(columns_.data()));
      bf16* gathered = packed + kSmallTokens * depth_;  // columns_ has room for twice as many
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(static_cast<const bf16*>(op_.x) + order[t] * op_.K, op_.K, gathered + t * depth_);
        std::fill(gathered + t * depth_ + op_.K, gathered + (t + 1) * depth_, bf16{});
      }
      for (int64_t tile = 0; tile < tiles; ++tile)
        pack_column_tile(gathered + tile * kTokenTile * depth_, depth_, tokens - tile * kTokenTile,
                         depth_ / kSmallDepth, packed + tile * size, tiles * size);
      const AmxScope scope(true, kSmallDepth);
      tiles_forward(matrix, ld, packed, tiles, depth_, c, kSmallTokens, {matrix, 0});
    }
  }

  const Project& op_;
  int64_t depth_;
  Scratch<char> columns_;
  Scratch<T> lines_;
  Scratch<float> room_;
};

}  // namespace

Tensor cpu::grouped_project(Tensor x, std::vector<Tensor> lora_A, Tensor order, Tensor starts,
                            std::optional<Tensor> ranks) {
  check_matrix(x, "x");
  check_contiguous(x, "x");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "x must be float32, bfloat16 or float16");
  const RowGroups groups(order, starts, x.size(0));
  const GroupedFactor factor(lora_A, "lora_A", ranks, 0, groups.adapters(), x.size(1));
  STD_TORCH_CHECK(factor.dtype() != ScalarType::Double, "lora_A must be float32, bfloat16 or float16");
  const int64_t size[] = {x.size(0), factor.largest_rank()};
  Tensor h = torch::stable::new_zeros(x, {size, 2});
  const Project op{x.const_data_ptr(), h.mutable_data_ptr(), x.size(1), size[1], &groups, &factor};
  GroupTasks tasks;
  int64_t work = 0;
  for (int64_t a = 0; a < groups.adapters(); ++a) {
    tasks.add(groups, a, kSmallTokens, factor.rank(a), kSmallRows);
    if (groups.end(a) > groups.begin(a)) work += (groups.end(a) - groups.begin(a)) * factor.rank(a) * op.K;
  }
  LORA_FAST_BY_SHORT_DTYPE(x.scalar_type(), T, tasks.run(threads_for(work), [&] {
    Worker<T> worker(op);
    GroupTask task;
    while (tasks.next(task)) worker.run(task);
  }))
  return h;
}

}  // namespace lora_fast
