#include "packed.h"

#include "parallel.h"

namespace lora_fast {
namespace {

// Elements that one thread packs in some ten microseconds.
constexpr int64_t kPackGrain = 16384;

int64_t grain_of(int64_t elements_each) {
  return std::max<int64_t>(1, kPackGrain / elements_each);
}

}  // namespace

LORA_FAST_CLONES void pack_rows_into(void* dst, const Factor& f, const RankLayout& layout, bool wide,
                                     int64_t first, int64_t rows) {
  if (layout.pairs) {
    pack_rows<bf16, bf16>(static_cast<bf16*>(dst), f, layout, first, rows);
  } else if (wide) {
    LORA_FAST_BY_DTYPE(f.dtype, T, pack_rows<double, T>(static_cast<double*>(dst), f, layout, first, rows))
  } else {
    LORA_FAST_BY_DTYPE(f.dtype, T, pack_rows<float, T>(static_cast<float*>(dst), f, layout, first, rows))
  }
}

LORA_FAST_CLONES void pack_panel_into(void* dst, const Factor& f, const RankLayout& layout, bool wide,
                                      int64_t first, int64_t cols) {
  if (layout.pairs) {
    pack_panel_pairs(static_cast<bf16*>(dst), f, layout, first, cols);
  } else if (wide) {
    LORA_FAST_BY_DTYPE(f.dtype, T, pack_panel<double, T>(static_cast<double*>(dst), f, layout, first, cols))
  } else {
    LORA_FAST_BY_DTYPE(f.dtype, T, pack_panel<float, T>(static_cast<float*>(dst), f, layout, first, cols))
  }
}

LORA_FAST_CLONES void widen_line(double* dst, const void* data, ScalarType dtype, int64_t offset,
                                 int64_t stride, int64_t n){
    LORA_FAST_BY_DTYPE(dtype, T, convert_line(dst, static_cast<const T*>(data) + offset, stride, n))}

PackedRows::PackedRows(const Factor& factor, int64_t count, const RankLayout& layout, bool wide)
    : row_bytes_(layout.depth * packed_size(layout, wide)), data_(round_up(count, kTileRows) * row_bytes_) {
  for_chunks(chunk_count(count, grain_of(layout.depth)), count, [&](int64_t, int64_t begin, int64_t end) {
    pack_rows_into(data_.data() + begin * row_bytes_, factor, layout, wide, begin, end - begin);
  });
  std::memset(data_.data() + count * row_bytes_, 0,
              static_cast<size_t>((round_up(count, kTileRows) - count) * row_bytes_));
}

PackedPanels::PackedPanels(const Factor& factor, int64_t count, const RankLayout& layout, bool wide)
    : panel_bytes_(layout.depth * kTileCols * packed_size(layout, wide)),
      data_(round_up(count, kTileCols) / kTileCols * panel_bytes_) {
  const int64_t panels = round_up(count, kTileCols) / kTileCols;
  const int64_t chunks = chunk_count(panels, grain_of(layout.depth * kTileCols));
  for_chunks(chunks, panels, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kTileCols;
      pack_panel_into(data_.data() + b * panel_bytes_, factor, layout, wide, first,
                      std::min(kTileCols, count - first));
    }
  });
}

PackedVector::PackedVector(const Tensor& vector, bool wide, bool dealt)
    : data_(round_up(vector.size(0), kTileCols) * (wide ? 8 : 4)) {
  const int64_t count = vector.size(0), padded = round_up(count, kTileCols);
  RankLayout layout(count, false, false);
  layout.depth = padded;
  pack_rows_into(data_.data(), {vector.const_data_ptr(), vector.scalar_type(), 0, vector.stride(0)}, layout,
                 wide, 0, 1);
  if (!dealt) return;
  if (wide) {
    deal(reinterpret_cast<double*>(data_.data()), padded);
  } else {
    deal(reinterpret_cast<float*>(data_.data()), padded);
  }
}

}  // namespace lora_fast
