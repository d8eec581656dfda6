// Rows sorted by adapter, and the checks of what the kernels for them are given.
#include "grouped.h"

#include "ops.h"

namespace lora_fast {
namespace {

const int64_t* int64s(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 &&
                      tensor.size(0) == size && tensor.is_contiguous(),
                  name, " must be a contiguous int64 vector of size ", size, " on the CPU");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

}  // namespace

RowGroups::RowGroups(const Tensor& order, const Tensor& starts, int64_t rows)
    : order_(int64s(order, "order", rows)),
      starts_(int64s(starts, "starts", starts.numel())),
      adapters_(starts.numel() - 3) {
  STD_TORCH_CHECK(adapters_ >= 1, "starts must be of one adapter or more, got ", adapters_);
  bool sorted = starts_[0] == 0 && starts_[adapters_ + 1] == rows && starts_[adapters_ + 2] == rows;
  for (int64_t g = 0; g < adapters_ + 2; ++g) sorted = sorted && starts_[g] <= starts_[g + 1];
  for (int64_t i = 0; i < rows; ++i) sorted = sorted && order_[i] >= 0 && order_[i] < rows;
  STD_TORCH_CHECK(sorted, "order and starts must be what group_rows makes of ", rows, " rows");
}

GroupedFactor::GroupedFactor(const std::vector<Tensor>& tensors, const char* name,
                             const std::optional<Tensor>& ranks, int64_t rank_dim, int64_t adapters,
                             int64_t size) {
  STD_TORCH_CHECK(!tensors.empty(), name, " must be one stack or a matrix for each adapter, got nothing");
  const bool stacked = tensors[0].dim() == 3;
  STD_TORCH_CHECK(stacked ? tensors.size() == 1 && tensors[0].size(0) == adapters
                          : tensors.size() == static_cast<size_t>(adapters),
                  name, " must be of ", adapters, " adapters");
  dtype_ = tensors[0].scalar_type();
  const int64_t* given = ranks ? int64s(*ranks, "ranks", adapters) : nullptr;
  for (int64_t a = 0; a < adapters; ++a) {
    const Tensor& tensor = tensors[stacked ? 0 : static_cast<size_t>(a)];
    const int64_t lead = stacked ? 1 : 0;
    check_float(tensor, name);
    STD_TORCH_CHECK(tensor.dim() == 2 + lead && tensor.scalar_type() == dtype_, name,
                    " must be one stack or matrices of one dtype");
    check_size(tensor, name, lead + 1 - rank_dim, size);
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    if (stacked) data += a * tensor.stride(0) * size_of(dtype_);
    factors_.push_back({data, dtype_, tensor.stride(lead + 1 - rank_dim), tensor.stride(lead + rank_dim)});
    const int64_t room = tensor.size(lead + rank_dim), rank = given != nullptr ? given[a] : room;
    STD_TORCH_CHECK(rank >= 0 && rank <= room, "ranks must be in [0, ", room, "], got ", rank);
    ranks_.push_back(rank);
    largest_ = std::max(largest_, room);
  }
}

std::tuple<Tensor, Tensor> cpu::group_rows(Tensor adapter, int64_t count) {
  STD_TORCH_CHECK(count >= 1, "count must be 1 or more, got ", count);
  const int64_t rows = adapter.numel();
  const int64_t* ids = int64s(adapter, "adapter", rows);
  const int64_t order_size[] = {rows}, starts_size[] = {count + 3};
  Tensor order = torch::stable::new_empty(adapter, {order_size, 1});
  Tensor starts = torch::stable::new_zeros(adapter, {starts_size, 1});
  int64_t* at = static_cast<int64_t*>(starts.mutable_data_ptr());
  for (int64_t t = 0; t < rows; ++t) {
    STD_TORCH_CHECK(ids[t] >= -1 && ids[t] < count, "adapter: got the id ", ids[t], ", expected it in [-1, ",
                    count - 1, "] (-1: the base)");
    ++at[ids[t] + 2];
  }
  for (int64_t g = 0; g < count + 2; ++g) at[g + 1] += at[g];
  std::vector<int64_t> next(at, at + count + 1);
  int64_t* out = static_cast<int64_t*>(order.mutable_data_ptr());
  for (int64_t t = 0; t < rows; ++t) out[next[static_cast<size_t>(ids[t] + 1)]++] = t;
  return {order, starts};
}

}  // namespace lora_fast
