// Names to functions. The schemas are defined in lora_fast/backends/extension.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace lora_fast {

Tensor cpu::scratch_events(bool record) {
  const std::vector<ScratchEvent> events = take_scratch_events(record);
  const int64_t size[] = {static_cast<int64_t>(events.size()), 2};
  Tensor out = torch::stable::empty({size, 2}, ScalarType::Long);
  static_assert(sizeof(ScratchEvent) == 2 * sizeof(int64_t));
  if (!events.empty())
    std::memcpy(out.mutable_data_ptr(), events.data(), events.size() * sizeof(ScratchEvent));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CPU, m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&cpu::weight_norm_fwd));
  m.impl("weight_norm_kept", TORCH_BOX(&cpu::weight_norm_kept));
  m.impl("quantised_norm_fwd", TORCH_BOX(&cpu::quantised_norm_fwd));
  m.impl("quantised_linear_small_fwd", TORCH_BOX(&cpu::quantised_linear_small_fwd));
  m.impl("load_kept_norm", TORCH_BOX(&cpu::load_kept_norm));
  m.impl("keep_norm", TORCH_BOX(&cpu::keep_norm));
  m.impl("weight_norm_bwd", TORCH_BOX(&cpu::weight_norm_bwd));
  m.impl("lora_compose_fwd", TORCH_BOX(&cpu::lora_compose_fwd));
  m.impl("lora_gain_bwd", TORCH_BOX(&cpu::lora_gain_bwd));
  m.impl("lora_linear_fwd", TORCH_BOX(&cpu::lora_linear_fwd));
  m.impl("dora_linear_fwd", TORCH_BOX(&cpu::dora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&cpu::lora_linear_bwd));
  m.impl("lora_linear_small_fwd", TORCH_BOX(&cpu::lora_linear_small_fwd));
  m.impl("dora_linear_small_fwd", TORCH_BOX(&cpu::dora_linear_small_fwd));
  m.impl("lora_linear_small_bwd", TORCH_BOX(&cpu::lora_linear_small_bwd));
  m.impl("is_zero", TORCH_BOX(&cpu::is_zero));
  m.impl("group_rows", TORCH_BOX(&cpu::group_rows));
  m.impl("grouped_weight_norm_fwd", TORCH_BOX(&cpu::grouped_weight_norm_fwd));
  m.impl("grouped_project", TORCH_BOX(&cpu::grouped_project));
  m.impl("grouped_compose", TORCH_BOX(&cpu::grouped_compose));
  m.impl("grouped_linear_small_fwd", TORCH_BOX(&cpu::grouped_linear_small_fwd));
  m.impl("grouped_gain_bwd", TORCH_BOX(&cpu::grouped_gain_bwd));
  m.impl("lora_glu_fwd", TORCH_BOX(&cpu::lora_glu_fwd));
  m.impl("lora_glu_bwd", TORCH_BOX(&cpu::lora_glu_bwd));
  m.impl("dropout", TORCH_BOX(&cpu::dropout));
  m.impl("merge_weight", TORCH_BOX(&cpu::merge_weight));
  m.impl("content_key", TORCH_BOX(&cpu::content_key));
  m.impl("content_key_of", TORCH_BOX(&cpu::content_key_of));
}

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CompositeExplicitAutograd, m) {
  m.impl("scratch_events", TORCH_BOX(&cpu::scratch_events));
}

}  // namespace lora_fast
