// Products of a whole weight with few rows, which cost one read of the weight. A processor makes them in one
// of three ways, each of which has two functions here: rows of W times columns that are rows of K elements
// (x, or what else is multiplied with W), and rows of dy times W.
#pragma once

#include <cstdint>

#include "rank_tile_amx.h"

namespace lora_fast {

// tiles: bfloat16 on AMX, inside an AmxScope of step kSmallDepth, which makes every tile 16 rows of 64 bytes
// pairs: bfloat16, the pairwise products of AVX512-BF16
// vectors: float32, to which 16-bit elements are widened, by the vectors of any processor
enum class Products { tiles, pairs, vectors };

template <class T>
inline Products products_of() {
  if constexpr (std::is_same_v<T, bf16>) {
    if (amx_enabled()) return Products::tiles;
    if (avx512_bf16_enabled()) return Products::pairs;
  }
  return Products::vectors;
}

constexpr int64_t kSmallTokens = 32;
// Weight rows of one step of a product, and what the weight's sizes must be multiples of.
constexpr int64_t kSmallRows = 32;
constexpr int64_t kSmallDepth = 32;
// Tokens in one AMX tile; two tiles and two tiles of weight rows fill the eight tile registers.
constexpr int64_t kTokenTile = 16;

// Rows of W that are fetched into the second-level cache along the way: more rows are read side by side than
// the processor's own prefetcher follows.
template <class T>
struct Ahead {
  const T* rows;
  int64_t count;
};

// c [32][tiles · 16] = W x for 32 rows of W, with row strides of ld and ld_c elements; x packed as
// [depth / 32][tiles][16 pairs][16 tokens][2].
void tiles_forward(const bf16* weight, int64_t ld, const bf16* x, int64_t tiles, int64_t depth, float* c,
                   int64_t ld_c, Ahead<bf16> ahead);

// sums[i] += the squares of row i of W, for 32 rows (row stride ld elements) of `depth` elements
void tiles_squares(const bf16* weight, int64_t ld, int64_t depth, float* sums, Ahead<bf16> ahead);

// c [strips][tiles · 16][32] += g W for 32 rows of W (row stride ld elements) and `strips` strips of 32
// columns; g is [tiles · 16][32] with row stride ld_g. The columns of c are de-interleaved (see Strip).
void tiles_backward(const bf16* g, int64_t ld_g, const bf16* weight, int64_t ld, int64_t strips,
                    int64_t tiles, float* c);

// Columns or tokens that leave the time to reading W.
constexpr int64_t kFewest = 4;

// Columns that W's rows are multiplied with: the first `count` of `packed` columns of `depth` elements, of
// bfloat16 for pairs, else of float32, and for 16-bit weights in the order of strips (see Strip). They lie
// stretch by stretch, [depth / stretch][packed][stretch], the last stretch as long as what is left.
struct DotColumns {
  const void* data;
  int64_t packed, count, depth;
};

// Elements of a stretch: those of all columns stay in the first-level cache while the rows go by, few columns
// leave room for pieces of the rows that the processor's own prefetcher follows, and many would have their
// sums read too often. The sums of stretches are summed in turn, whose error grows less than a running sum's.
template <class Element>
constexpr int64_t dot_stretch(int64_t columns) {
  const int64_t bytes = columns <= kFewest ? 4096 : columns <= kSmallTokens ? 1024 : 2048;
  return bytes / static_cast<int64_t>(sizeof(Element));
}

// Floats of room that dot_forward needs for its sums, at a multiple of 64 bytes.
constexpr int64_t dot_room(int64_t rows, int64_t columns) {
  return rows * (columns + 1) * kLanes;
}

// c [rows][ld_c] = W x for some rows of W, a multiple of kDotRows (row stride ld elements). Where squares is
// given, squares [rows] = those of the rows. The rows behind them are fetched meanwhile.
constexpr int64_t kDotRows = 4;
template <class T>
void dot_forward(const T* weight, int64_t ld, int64_t rows, const DotColumns& columns, float* c, int64_t ld_c,
                 float* squares, float* room);

// c [strips][tokens][32] += g W for 32 rows of W (row stride ld elements) and `strips` strips of 32 columns;
// g is [tokens][32] with row stride ld_g. Of 16-bit weights the columns of c are de-interleaved.
template <class T>
void dot_backward(const T* g, int64_t ld_g, const T* weight, int64_t ld, int64_t strips, int64_t tokens,
                  float* c);

}  // namespace lora_fast
