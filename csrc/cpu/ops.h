// The CPU kernels by their names in the library; each is defined in <name>.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace lora_fast::cpu {

Tensor weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output);

Tensor weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                        Tensor kept_norm, Tensor kept_key, int64_t version);

Tensor quantised_norm_fwd(Tensor codes, Tensor scale, std::optional<Tensor> levels, ScalarType dtype,
                          Tensor lora_A, Tensor lora_B, double scaling);

// lora_linear of up to 32 tokens in x's dtype, to which W's rows are rounded.
Tensor quantised_linear_small_fwd(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> levels,
                                  Tensor lora_A, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                                  std::optional<Tensor> bias);

// Whether kept_key is key; norm is then a copy of kept_norm.
bool load_kept_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor norm);
void keep_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor norm);

std::tuple<Tensor, Tensor> weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A,
                                           Tensor lora_B, double scaling, bool per_output, bool need_A,
                                           bool need_B);

void lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                      std::optional<Tensor> bias, Tensor out, std::optional<Tensor> product);

std::tuple<Tensor, Tensor, Tensor> lora_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                 std::optional<Tensor> gain, bool need_scaled, bool need_gain,
                                                 bool need_bias);

// What a gated MLP hands to its down linear, from the base products of gate and up, and the gradients: to
// these, [2, tokens, width] or joined [tokens, 2 width], the output again, and to gate's and up's gain and
// bias.
Tensor lora_glu_fwd(Tensor base_gate, Tensor base_up, std::optional<Tensor> h_gate,
                    std::optional<Tensor> h_up, std::optional<Tensor> lora_B_gate,
                    std::optional<Tensor> lora_B_up, double scaling_gate, double scaling_up,
                    std::optional<Tensor> gain_gate, std::optional<Tensor> gain_up,
                    std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up, int64_t activation);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_glu_bwd(
    Tensor grad, Tensor base_gate, Tensor base_up, std::optional<Tensor> h_gate, std::optional<Tensor> h_up,
    std::optional<Tensor> lora_B_gate, std::optional<Tensor> lora_B_up, double scaling_gate,
    double scaling_up, std::optional<Tensor> gain_gate, std::optional<Tensor> gain_up,
    std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up, int64_t activation, bool need_output,
    bool need_gain_gate, bool need_gain_up, bool need_bias_gate, bool need_bias_up, bool joined);

Tensor dropout(Tensor x, Tensor seed, double p);

void merge_weight(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, std::optional<Tensor> gain,
                  bool per_output);

Tensor content_key(Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, bool per_output,
                   int64_t version);

// The part of it that is hashed from elements, of a W that is made of several matrices.
Tensor content_key_of(Tensor lora_A, Tensor lora_B, std::vector<Tensor> made_of, int64_t host);

Tensor lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                             std::optional<Tensor> gain, std::optional<Tensor> bias, Tensor y,
                             std::optional<Tensor> product);

// The same with gain = magnitude / norm; norm is written, from the kept one if that holds, and else kept.
Tensor dora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                             Tensor magnitude, std::optional<Tensor> bias, Tensor y,
                             std::optional<Tensor> product, Tensor norm, std::optional<Tensor> kept_norm,
                             std::optional<Tensor> kept_key, int64_t version);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_small_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> product, std::optional<Tensor> h, bool need_x,
    bool need_A, bool need_B, bool need_gain, bool need_bias);

Tensor lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling, Tensor gain,
                       std::optional<Tensor> bias, Tensor y, std::optional<Tensor> product);

// The same with gain = magnitude / norm; norm is written unless it is known.
Tensor dora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                       Tensor magnitude, std::optional<Tensor> bias, Tensor y, std::optional<Tensor> product,
                       Tensor norm, bool norm_known);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> product, std::optional<Tensor> h, bool need_x,
    bool need_A, bool need_B, bool need_gain, bool need_bias);

bool is_zero(Tensor matrix);

// Rows of many adapters. order and starts are what group_rows makes of their ids; lora_A and lora_B are one
// stack or a matrix for each adapter.
std::tuple<Tensor, Tensor> group_rows(Tensor adapter, int64_t count);

// [adapters, N]: lora_A and lora_B are a matrix for each adapter.
Tensor grouped_weight_norm_fwd(Tensor weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                               std::vector<double> scaling);

Tensor grouped_project(Tensor x, std::vector<Tensor> lora_A, Tensor order, Tensor starts,
                       std::optional<Tensor> ranks);

// factors are lora_B, or lora_A where `transposed`.
void grouped_compose(Tensor base, Tensor h, std::vector<Tensor> factors, bool transposed,
                     std::optional<Tensor> scaling, std::optional<Tensor> gain, std::optional<Tensor> bias,
                     Tensor order, Tensor starts, std::optional<Tensor> ranks, Tensor out,
                     std::optional<Tensor> product);

// y, and product where it is given, are written; h is returned. Up to 32 tokens.
Tensor grouped_linear_small_fwd(Tensor x, Tensor weight, std::vector<Tensor> lora_A,
                                std::vector<Tensor> lora_B, Tensor scaling, std::optional<Tensor> gain,
                                std::optional<Tensor> bias, Tensor order, Tensor starts,
                                std::optional<Tensor> ranks, Tensor y, std::optional<Tensor> product);

std::tuple<Tensor, Tensor, Tensor> grouped_gain_bwd(Tensor grad_y, std::optional<Tensor> product,
                                                    std::optional<Tensor> gain, Tensor order, Tensor starts,
                                                    bool need_scaled, bool need_gain, bool need_bias);

// int64 [n, 2], see take_scratch_events
Tensor scratch_events(bool record);

}  // namespace lora_fast::cpu
