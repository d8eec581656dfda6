// n = ‖W + s B A‖ by rows of a quantised W, of which no more than a tile is ever made: W = value(code) ·
// scale, rounded to a dtype. Strips of every dtype are de-interleaved ("dealt"), as the codes are: the even
// columns are the high halves of the bytes, or the low bytes of pairs.
//
// On an AMD EPYC (Zen 5), one thread, 2048 × 2048, rank 16, bfloat16, ms: 0.72 for 4 bits in blocks of 64,
// 0.67 for 8 bits, where the norm of a W in memory takes 0.44, and blocks of 256 rows that are dequantised
// and given to it take 1.5 and 1.7. Built for AVX2: 3.6 and 2.0, W in memory 2.0.
#include "quantised_weight.h"

#include "ops.h"
#include "row_norms.h"

namespace lora_fast {
namespace {

// made [rows][kTileCols] = W's dealt strips at the place, from column k on
template <class T, bool four_bits>
LORA_FAST_CLONES void make_by_elements(const QuantisedWeight& w, const TilePlace& place, int64_t k,
                                       float* made) {
  for (int64_t r = 0; r < place.rows; ++r)
    for (int64_t c = k; c < place.cols; c += kStrip)
      store_packed(made + r * kTileCols + c, strip_by_elements<T, four_bits>(w, place.i + r, place.j + c));
}

// V at (i, j): the codes' values and P Q's.
template <class F, class T, bool four_bits>
struct QuantisedTile : TilePlace {
  static constexpr int64_t kInByte = four_bits ? 2 : 1, kStrips = kTileCols / kStrip;

  // Whether W's strips go through memory: of 4 bits where vectors look nothing up; of 8 bits in float32,
  // since in one expression with the update the compiler would leave out the rounding of the products.
  LORA_FAST_INLINE static bool makes_strips() { return four_bits ? !has_avx512_vectors() : sizeof(T) == 4; }

  // What is ready before the strips are asked for, of all rows.
  struct Made {
    alignas(64) float strips[kTileRows * kTileCols];  // W's, from the column `made_from` on
    // of a strip's block the sixteen numbers that codes of 4 bits stand for, or sixteen times its scale
    alignas(64) float numbers[kTileRows * kStrips * kLanes];
    float levels[kLanes];
  };

  const QuantisedWeight& w;
  Vec<F> scaling;
  const F* update;  // [rows][kTileCols], in the order of strips
  Made& made;
  int64_t made_from;
  int64_t first[kStrips];  // of the strips that have one scale each: the tile's first of the same block

  LORA_FAST_INLINE void make() {
    const int64_t whole = w.strips_have_one_scale ? cols / kStrip : 0;
    const bool makes = makes_strips();
    made_from = makes ? 0 : whole * kStrip;
    int64_t blocks[kStrips];
    for (int64_t s = 0; s < whole; ++s) {
      blocks[s] = (j + s * kStrip) / w.block;
      first[s] = s > 0 && blocks[s] == blocks[s - 1] ? first[s - 1] : s;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < whole; ++s) {
        float *own = numbers(r, s), *strip = made.strips + r * kTileCols + s * kStrip;
        if (first[s] == s) {
          std::fill_n(own, kLanes, with_usual_nan(w.scale_of(i + r)[blocks[s]]));
          if constexpr (four_bits)
            store<float>(own, rounded_but_nan<T>(load<float>(made.levels) * load<float>(own)));
        }
        if (!makes) continue;
        if constexpr (four_bits) {
          load_strip_of_codes(codes(r, s * kStrip), own, strip);
        } else {
          store_packed(strip, scaled_strip<T>(codes(r, s * kStrip), own));
        }
      }
    }
    if (whole * kStrip < cols) make_by_elements<T, four_bits>(w, *this, whole * kStrip, made.strips);
  }

  LORA_FAST_INLINE float* numbers(int64_t r, int64_t s) const {
    return made.numbers + (r * kStrips + first[s]) * kLanes;
  }

  LORA_FAST_INLINE const uint8_t* codes(int64_t r, int64_t k) const {
    return w.row(i + r) + (j + k) / kInByte;
  }

  // the next tile's codes of row r
  LORA_FAST_INLINE void fetch(int64_t r) const {
    const uint8_t* next = codes(r, kTileCols);
    for (int64_t byte = 0; byte < kTileCols / kInByte; byte += 64) __builtin_prefetch(next + byte, 0, 2);
  }

  LORA_FAST_INLINE Strip<F> strip(int64_t r, int64_t k) const {
    Strip<float> x;
    if (k >= made_from) {
      x = load_packed(made.strips + r * kTileCols + k);
    } else if constexpr (four_bits) {
      x = look_up_strip(codes(r, k), numbers(r, k / kStrip));
    } else {
      x = scaled_strip<T>(codes(r, k), numbers(r, k / kStrip));
    }
    const Strip<F> u = load_packed(update + r * kTileCols + k);
    return {from_f32<F>(x.even) + scaling * u.even, from_f32<F>(x.odd) + scaling * u.odd};
  }
};

// squares[i] for the blocks of kTileRows rows in [begin, end)
template <class F, class T, bool four_bits>
LORA_FAST_INLINE void square_rows_of(const QuantisedWeight& w, const PackedAdapter& adapter, double* squares,
                                     int64_t begin, int64_t end) {
  using Tile = QuantisedTile<F, T, four_bits>;
  typename Tile::Made made;
  if constexpr (four_bits) store_bits(made.levels, levels_of(w));
  RowSquares<F> rows(w, squares);
  const Vec<F> scaling = splat(static_cast<F>(w.scaling));
  const TileRange range{begin, end, 0, col_blocks(w), few_tile_rows(adapter.layout)};
  const auto nothing = [](const TilePlace&) LORA_FAST_ALWAYS_INLINE {};
  for_each_update<F>(w, adapter, range, nothing,
                     [&](const TilePlace& place, const F* update) LORA_FAST_ALWAYS_INLINE {
                       Tile tile{place, w, scaling, update, made, 0, {}};
                       tile.make();
                       rows.add(tile);
                     });
}

template <class F, bool four_bits>
LORA_FAST_CLONES void square_rows(const QuantisedWeight& w, const PackedAdapter& adapter, double* squares,
                                  int64_t begin, int64_t end) {
  LORA_FAST_BY_DTYPE(w.dtype, T, square_rows_of<F, T, four_bits>(w, adapter, squares, begin, end))
}

// line [cols] = W's row i
template <class T, bool four_bits>
LORA_FAST_INLINE void widen_row_of(const QuantisedWeight& w, int64_t i, double* line) {
  for (int64_t j = 0; j < w.cols; j += kStrip) {
    Strip<float> x = strip_by_elements<T, four_bits>(w, i, j);
    undeal_strip(x.even, x.odd);
    double strip[kStrip];
    store_packed<double>(strip, {from_f32<double>(x.even), from_f32<double>(x.odd)});
    std::memcpy(line + j, strip, static_cast<size_t>(std::min(kStrip, w.cols - j)) * sizeof(double));
  }
}

template <bool four_bits>
LORA_FAST_CLONES void widen_row(const QuantisedWeight& w, int64_t i, double* line) {
  LORA_FAST_BY_DTYPE(w.dtype, T, widen_row_of<T, four_bits>(w, i, line))
}

template <class F, bool four_bits>
void norm(const QuantisedWeight& w, F* norms) {
  const PackedAdapter adapter(w, true);
  norm_rows(
      w, adapter, norms,
      [&](double* squares, int64_t begin, int64_t end) {
        square_rows<F, four_bits>(w, adapter, squares, begin, end);
      },
      [&](int64_t i, double* buffer) {
        widen_row<four_bits>(w, i, buffer);
        return norm_of_held_line(w, true, i, buffer);
      });
}

template <class F>
void norm_by_form(const QuantisedWeight& w, F* norms) {
  w.levels != nullptr ? norm<F, true>(w, norms) : norm<F, false>(w, norms);
}

}  // namespace

Tensor cpu::quantised_norm_fwd(Tensor codes, Tensor scale, std::optional<Tensor> levels, ScalarType dtype,
                               Tensor lora_A, Tensor lora_B, double scaling) {
  check_quantised(codes, scale, levels, lora_A, lora_B);
  const QuantisedWeight w(codes, scale, levels, dtype, lora_A, lora_B, scaling);
  const int64_t size[] = {w.rows};
  Tensor norms = torch::stable::new_empty(scale, {size, 1}, w.wide ? ScalarType::Double : ScalarType::Float);
  if (w.wide) {
    norm_by_form(w, static_cast<double*>(norms.mutable_data_ptr()));
  } else {
    norm_by_form(w, static_cast<float*>(norms.mutable_data_ptr()));
  }
  return norms;
}

}  // namespace lora_fast
