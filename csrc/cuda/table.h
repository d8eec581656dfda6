// Names to functions. The schemas are defined in lora_fast/backends/extension.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace lora_fast::cuda {

template <class Library>
void implement(Library& m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&weight_norm_fwd));
  m.impl("weight_norm_kept", TORCH_BOX(&weight_norm_kept));
  m.impl("lora_compose_fwd", TORCH_BOX(&lora_compose_fwd));
  m.impl("lora_gain_bwd", TORCH_BOX(&lora_gain_bwd));
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_small_fwd", TORCH_BOX(&linear_small_fwd));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("merge_weight", TORCH_BOX(&merge_weight));
}

}  // namespace lora_fast::cuda
