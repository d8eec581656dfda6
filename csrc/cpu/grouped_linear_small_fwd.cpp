// lora_linear for up to 32 tokens that have adapters of their own, in one call: W is read once for all of
// them. Where they have all the same adapter, it is that adapter's linear.
#include "grouped.h"
#include "ops.h"
#include "small_common.h"

namespace lora_fast {
namespace {

// The adapter of all rows, or -1.
int64_t only_adapter(const RowGroups& groups, int64_t rows) {
  for (int64_t a = 0; a < groups.adapters(); ++a)
    if (groups.end(a) - groups.begin(a) == rows) return a;
  return -1;
}

// Of one adapter, of its own rank, as the kernels of one adapter take it.
Tensor matrix(const std::vector<Tensor>& tensors, int64_t adapter, int64_t rank_dim, int64_t rank) {
  const bool stacked = tensors[0].dim() == 3;
  Tensor own =
      stacked ? torch::stable::select(tensors[0], 0, adapter) : tensors[static_cast<size_t>(adapter)];
  if (own.size(rank_dim) != rank) own = torch::stable::narrow(own, rank_dim, 0, rank);
  return torch::stable::contiguous(own);
}

double number(const Tensor& vector, int64_t i) {
  double value = 0;
  widen_line(&value, vector.const_data_ptr(), vector.scalar_type(), i * vector.stride(0), 1, 1);
  return value;
}

// The adapters' tokens are the group's: h [tokens, rank] as [tokens, largest].
Tensor widened(const Tensor& h, int64_t largest) {
  if (h.size(1) == largest) return h;
  return torch::stable::pad(h, {0, largest - h.size(1)});
}

}  // namespace

Tensor cpu::grouped_linear_small_fwd(Tensor x, Tensor weight, std::vector<Tensor> lora_A,
                                     std::vector<Tensor> lora_B, Tensor scaling, std::optional<Tensor> gain,
                                     std::optional<Tensor> bias, Tensor order, Tensor starts,
                                     std::optional<Tensor> ranks, Tensor y, std::optional<Tensor> product) {
  constexpr int64_t kLargestRank = 128;  // of the kernel of one adapter, whose rank step is not in tiles
  check_few_tokens(x, "x");
  check_few_tokens_weight(weight);
  const int64_t rows = x.size(0), N = weight.size(0), K = weight.size(1);
  const RowGroups groups(order, starts, rows);
  const int64_t adapters = groups.adapters();
  check_vector(scaling, "scaling", adapters);
  const GroupedFactor A(lora_A, "lora_A", ranks, 0, adapters, K), B(lora_B, "lora_B", ranks, 1, adapters, N);
  const auto read_by_one = [&](const GroupedFactor& f) {
    return f.dtype() == ScalarType::Float || f.dtype() == weight.scalar_type();
  };
  const int64_t one = only_adapter(groups, rows), rank = one < 0 ? 0 : A.rank(one);
  if (rank > 0 && rank <= kLargestRank && read_by_one(A) && read_by_one(B)) {
    std::optional<Tensor> own_gain;
    if (gain) own_gain = torch::stable::select(*gain, 0, one);
    const Tensor h =
        lora_linear_small_fwd(x, weight, matrix(lora_A, one, 0, rank), matrix(lora_B, one, 1, rank),
                              number(scaling, one), own_gain, bias, y, product);
    return widened(h, A.largest_rank());
  }
  const int64_t none_A[] = {0, K}, none_B[] = {N, 0};
  const Tensor no_A = torch::stable::new_empty(x, {none_A, 2}),
               no_B = torch::stable::new_empty(x, {none_B, 2});
  lora_linear_small_fwd(x, weight, no_A, no_B, 1.0, std::nullopt, std::nullopt, y, std::nullopt);
  const Tensor h = grouped_project(x, lora_A, order, starts, ranks);
  grouped_compose(y, h, lora_B, false, scaling, gain, bias, order, starts, ranks, y, product);
  return h;
}

}  // namespace lora_fast
