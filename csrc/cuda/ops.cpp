#include "table.h"

STABLE_TORCH_LIBRARY_IMPL(lora_fast_c, CUDA, m) {
  lora_fast::cuda::implement(m);
}
