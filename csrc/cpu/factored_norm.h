// The norm of the rows of V = W + s B A from what a product with W gives on its way, without a read of W of
// its own:
//   n² = ‖W‖² + 2 s Σ_r B_r U_r + s² B G Bᵀ     U = W Aᵀ     G = A Aᵀ
// U is made beside x Wᵀ, from A as further tokens: a float32 A as the sum of two bfloat16 matrices, which is
// A to 2^-17, and as those errors have no sign, n² to about 2^-17 / √K of its middle term. Rows in which the
// terms cancel, or leave float's range, are redone by the direct sum in double.
#pragma once

#include <optional>

#include "norm_of_line.h"

namespace lora_fast {

class FactoredNorm {
 public:
  // in_parts: W's products are of bfloat16, else of float32
  FactoredNorm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
               bool in_parts);

  // The parts of A, [columns()][K], whose products with W are the columns of U: A itself where it is
  // bfloat16.
  int64_t columns() const { return parts_count_ * v_.rank; }
  const bf16* parts() const { return parts_; }
  // Without parts: A itself, [R][K]
  const float* rows() const { return rows_; }

  // norm[i] = n and gain[i] = magnitude[i] / n, 0 where n is 0, for the kTileRows rows of W from `first` on;
  // squares [kTileRows] holds their ‖W‖² and u [kTileRows][ld] their U in parts.
  void finish(int64_t first, const float* squares, const float* u, int64_t ld, const float* magnitude,
              float* norm, float* gain) const;

 private:
  AdaptedWeight v_;
  int64_t parts_count_, width_;  // width_: the rank in whole vectors
  Scratch<bf16> split_;          // a float32 A in two parts
  const bf16* parts_;
  std::optional<Scratch<float>> widened_;
  const float* rows_;       // A in float32, without parts
  Scratch<double> gram_;    // G [R][width]
  Scratch<float> lengths_;  // ‖A_r‖ [width]
};

}  // namespace lora_fast
