// Names to functions. The schemas are defined in lora_fast/backends/cpu.py.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace lora_fast {

int64_t cpu::scratch_peak_bytes(bool reset) {
  return lora_fast::scratch_peak_bytes(reset);
}

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CPU, m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&cpu::weight_norm_fwd));
  m.impl("weight_norm_kept", TORCH_BOX(&cpu::weight_norm_kept));
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
  m.impl("project_small", TORCH_BOX(&cpu::project_small));
  m.impl("input_grad_small", TORCH_BOX(&cpu::input_grad_small));
  m.impl("dropout", TORCH_BOX(&cpu::dropout));
  m.impl("merge_weight", TORCH_BOX(&cpu::merge_weight));
  m.impl("content_key", TORCH_BOX(&cpu::content_key));
}

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CompositeExplicitAutograd, m) {
  m.impl("scratch_peak_bytes", TORCH_BOX(&cpu::scratch_peak_bytes));
}

}  // namespace lora_fast
