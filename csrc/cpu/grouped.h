// What the kernels for rows of many adapters share: the groups of rows, the factors of all adapters, tasks.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "../checks.h"
#include "packed.h"
#include "parallel.h"

namespace lora_fast {

// Rows sorted by adapter: those of adapter a are order[begin(a)] ... order[end(a) - 1], those of none are of
// adapter -1. The tensors are the caller's.
class RowGroups {
 public:
  RowGroups(const Tensor& order, const Tensor& starts, int64_t rows);
  int64_t adapters() const { return adapters_; }
  int64_t begin(int64_t adapter) const { return starts_[adapter + 1]; }
  int64_t end(int64_t adapter) const { return starts_[adapter + 2]; }
  const int64_t* order() const { return order_; }

 private:
  const int64_t *order_, *starts_;
  int64_t adapters_;
};

// One side of the adapters, a matrix each, in a stack or apart: lora_A [R, K] or lora_B [N, R], of which
// `ranks` says how many rows or columns are an adapter's.
class GroupedFactor {
 public:
  // rank_dim: 0 or 1, where R stands in a matrix; `size` is the other one's.
  GroupedFactor(const std::vector<Tensor>& tensors, const char* name, const std::optional<Tensor>& ranks,
                int64_t rank_dim, int64_t adapters, int64_t size);
  const Factor& at(int64_t adapter) const { return factors_[static_cast<size_t>(adapter)]; }
  int64_t rank(int64_t adapter) const { return ranks_[static_cast<size_t>(adapter)]; }
  int64_t largest_rank() const { return largest_; }  // that a matrix has room for
  ScalarType dtype() const { return dtype_; }

 private:
  std::vector<Factor> factors_;
  std::vector<int64_t> ranks_;
  int64_t largest_ = 0;
  ScalarType dtype_;
};

// Some rows of one adapter, places in the order of the groups, and a range of what they are computed with.
struct GroupTask {
  int64_t adapter, begin, end, first, last;
};

// work() on up to `threads` threads, each of which takes tasks with next(task) until there are none: groups
// differ in size. What a task writes is its own, so that the result does not depend on who takes it.
class GroupTasks {
 public:
  // `rows` of a group at most to a task, and `step` of the `size` that each is computed with.
  void add(const RowGroups& groups, int64_t adapter, int64_t rows, int64_t size, int64_t step) {
    for (int64_t i = groups.begin(adapter); i < groups.end(adapter); i += rows)
      for (int64_t j = 0; j < size; j += step)
        tasks_.push_back({adapter, i, std::min(groups.end(adapter), i + rows), j, std::min(size, j + step)});
  }
  bool next(GroupTask& task) {
    const size_t i = next_++;
    if (i >= tasks_.size()) return false;
    task = tasks_[i];
    return true;
  }
  template <class Work>
  void run(int64_t threads, const Work& work) {
    const int64_t chunks = std::min(threads, static_cast<int64_t>(tasks_.size()));
    if (chunks > 0) for_chunks(chunks, chunks, [&](int64_t, int64_t, int64_t) { work(); });
  }

 private:
  std::vector<GroupTask> tasks_;
  std::atomic<size_t> next_{0};
};

// Threads that so much work is worth, as elements that are read or computed.
inline int64_t threads_for(int64_t work) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / 16384));
}

}  // namespace lora_fast
