// Names to functions. The schemas are defined in lora_fast/backends/cpu.py.
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace lora_fast {

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CUDA, m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&cuda::weight_norm_fwd));
  m.impl("weight_norm_kept", TORCH_BOX(&cuda::weight_norm_kept));
  m.impl("lora_compose_fwd", TORCH_BOX(&cuda::lora_compose_fwd));
  m.impl("lora_gain_bwd", TORCH_BOX(&cuda::lora_gain_bwd));
  m.impl("lora_linear_small_fwd", TORCH_BOX(&cuda::lora_linear_small_fwd));
  m.impl("dropout", TORCH_BOX(&cuda::dropout));
  m.impl("merge_weight", TORCH_BOX(&cuda::merge_weight));
}

}  // namespace lora_fast
