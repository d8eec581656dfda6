// Products of float32 operands on AMX. Every element is the sum of three of bfloat16, exactly, and of the
// nine products of their parts the six are made that are not far below half an ulp:
//   x = x₁ + x₂ + x₃,   |x₂| ≤ 2⁻⁸ |x|,   |x₃| ≤ 2⁻¹⁶ |x|
//   x w ≈ x₁w₁ + x₁w₂ + x₂w₁ + x₁w₃ + x₂w₂ + x₃w₁,   to 2⁻²³ |x w| at most, of either sign
// Finite elements whose magnitude is far from both ends of the range, see float_product.cpp.
#pragma once

#include <cstdint>

#include "amx_product.h"

namespace lora_fast {

constexpr int64_t kParts = 3;
constexpr int64_t kPartsStep = kParts * kPanelStep;  // elements of a panel in one step, part behind part

// c [2][2][16][16] = the product of an a-panel and a b-panel of `steps` steps; inside an AmxScope of step
// kDepth
void parts_product(const bf16* a, const bf16* b, int64_t steps, float* c);

// An a-panel from up to 32 rows of m (row stride ld), `steps` steps of 32 columns; missing rows are zero. All
// three return the bits of the largest magnitude that they read: NaN and infinity have the largest.
uint32_t split_rows(const float* m, int64_t ld, int64_t rows, int64_t steps, bf16* out);

// A b-panel whose columns are up to 32 rows of m; missing ones are zero.
uint32_t split_columns(const float* m, int64_t ld, int64_t rows, int64_t steps, bf16* out);

// A b-panel of 32 columns of m, summed over 32 rows in each of `steps` steps.
uint32_t split_pairs(const float* m, int64_t ld, int64_t steps, bf16* out);

}  // namespace lora_fast
