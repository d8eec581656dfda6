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

// Every launch of a forward, and of a backward, of LoRA's and DoRA's linear in one call from Python: (y,
// base, h, norm), and the gradients to x, lora_A, lora_B, the gain or magnitude, and bias. Empty what was not
// asked for. gain: as it is; magnitude: a gain of magnitude / norm, with the norm made here or kept; neither:
// LoRA.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                      Tensor lora_A, Tensor lora_B, double scaling,
                                                      std::optional<Tensor> gain,
                                                      std::optional<Tensor> magnitude, bool keep_base,
                                                      std::optional<Tensor> kept_norm,
                                                      std::optional<Tensor> kept_key, int64_t version);

// The same for up to 16 tokens in 16 bits, whose products take two launches.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_small_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> magnitude, bool keep_base,
    std::optional<Tensor> kept_norm, std::optional<Tensor> kept_key, int64_t version);

// product is v, or with from_base what linear_fwd kept; stacked [W; lora_A; zeros] makes dx in one product.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> magnitude, std::optional<Tensor> norm,
    std::optional<Tensor> product, std::optional<Tensor> h, bool from_base, bool need_x, bool need_A,
    bool need_B, bool need_gain, bool need_bias, std::optional<Tensor> stacked);

Tensor dropout(Tensor x, Tensor seed, double p);

}  // namespace lora_fast::cuda
