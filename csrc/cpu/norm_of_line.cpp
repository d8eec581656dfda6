#include "norm_of_line.h"

#include <cmath>

namespace lora_fast {
namespace {

// line += x factor
LORA_FAST_CLONES void add_scaled(double* line, const double* factor, double x, int64_t length) {
  for (int64_t k = 0; k < length; ++k) line[k] += x * factor[k];
}

}  // namespace

double norm_of_line(const AdaptedWeight& v, bool row, int64_t index, double* buffer) {
  const int64_t length = row ? v.cols : v.rows;
  const int64_t across = row ? v.row_stride : v.col_stride, along = row ? v.col_stride : v.row_stride;
  widen_line(buffer, v.data, v.dtype, index * across, along, length);
  return norm_of_held_line(v, row, index, buffer);
}

double norm_of_held_line(const RankUpdate& v, bool row, int64_t index, double* buffer) {
  const int64_t length = row ? v.cols : v.rows;
  double *line = buffer, *factor = line + length, *weights = factor + length;
  const Factor& one = row ? v.p : v.q;
  const Factor& all = row ? v.q : v.p;
  widen_line(weights, one.data, one.dtype, index * one.stride_outer, one.stride_rank, v.rank);
  for (int64_t r = 0; r < v.rank; ++r) {
    widen_line(factor, all.data, all.dtype, r * all.stride_rank, all.stride_outer, length);
    add_scaled(line, factor, v.scaling * weights[r], length);
  }
  double largest = 0, squares = 0;
  for (int64_t k = 0; k < length; ++k) largest = std::max(largest, std::abs(line[k]));
  const double unit = largest > 0 && std::isfinite(largest) ? largest : 1;
  for (int64_t k = 0; k < length; ++k) squares += (line[k] / unit) * (line[k] / unit);
  return unit * std::sqrt(squares);
}

}  // namespace lora_fast
