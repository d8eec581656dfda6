// The CUDA kernels by their names in the library; each is defined in <name>.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lora_fast::cuda {

using torch::stable::Tensor;

Tensor weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output);

Tensor weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        Tensor kept_norm, Tensor kept_key, int64_t version);

void lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                      std::optional<Tensor> bias, Tensor out, std::optional<Tensor> product);

void merge_weight(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                  bool per_output);

std::tuple<Tensor, Tensor, Tensor> lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                 std::optional<Tensor> gain, bool need_scaled, bool need_gain,
                                                 bool need_bias);

Tensor lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                             Tensor gain, std::optional<Tensor> bias, Tensor y,
                             std::optional<Tensor> product);

Tensor dropout(Tensor x, Tensor seed, double p);

}  // namespace lora_fast::cuda
