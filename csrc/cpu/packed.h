// The packed factors of a rank-R product, see RankLayout.
#pragma once

#include "../checks.h"
#include "rank_tile.h"

namespace lora_fast {

void pack_rows_into(void* dst, const Factor& factor, const RankLayout& layout, bool wide, int64_t first,
                    int64_t rows);
void pack_panel_into(void* dst, const Factor& factor, const RankLayout& layout, bool wide, int64_t first,
                     int64_t cols);

// dst[0..n) = the elements at offset, offset + stride, ... of data
void widen_line(double* dst, const void* data, ScalarType dtype, int64_t offset, int64_t stride, int64_t n);

inline bool is_dealt(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline int64_t packed_size(const RankLayout& layout, bool wide) {
  return layout.pairs ? 2 : wide ? 8 : 4;
}

// P [count, rounded up to kTileRows][depth]
class PackedRows {
 public:
  PackedRows(const Factor& factor, int64_t count, const RankLayout& layout, bool wide);
  const void* at(int64_t row) const { return data_.data() + row * row_bytes_; }

 private:
  int64_t row_bytes_;
  Scratch<char> data_;
};

// Q as panels of kTileCols columns
class PackedPanels {
 public:
  PackedPanels(const Factor& factor, int64_t count, const RankLayout& layout, bool wide);
  const void* at(int64_t col) const { return data_.data() + col / kTileCols * panel_bytes_; }

 private:
  int64_t panel_bytes_;
  Scratch<char> data_;
};

// A vector as float, or double where wide, zero-padded to whole tiles, in the order of strips where
// `dealt` (see Strip).
class PackedVector {
 public:
  PackedVector(const Tensor& vector, bool wide, bool dealt);
  const void* data() const { return data_.data(); }

 private:
  Scratch<char> data_;
};

}  // namespace lora_fast
