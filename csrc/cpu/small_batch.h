// Products with a whole weight for a few tokens, which cost one read of the weight. bfloat16 on AMX only;
// they run inside an AmxScope of step kSmallDepth, which makes every tile 16 rows of 64 bytes.
#pragma once

#include <cstdint>

#include "rank_tile_amx.h"

namespace lora_fast {

// Tokens come in tiles of 16; two tiles and two tiles of weight rows fill the eight tile registers.
constexpr int64_t kTokenTile = 16;
constexpr int64_t kSmallTokens = 32;
// Weight rows of one step of the forward product, and what its sizes must be multiples of.
constexpr int64_t kSmallRows = 32;
constexpr int64_t kSmallDepth = 32;

// Rows of W that are fetched into the second-level cache along the way: more rows are read side by side than
// the processor's own prefetcher follows.
struct Ahead {
  const bf16* rows;
  int64_t count;
};

// c [32][tiles · 16] = W x for 32 rows of W, with row strides of ld and ld_c elements; x packed as
// [depth / 32][tiles][16 pairs][16 tokens][2].
void small_forward(const bf16* weight, int64_t ld, const bf16* x, int64_t tiles, int64_t depth, float* c,
                   int64_t ld_c, Ahead ahead);

// sums[i] += the squares of row i of W, for 32 rows (row stride ld elements) of `depth` elements
void row_squares(const bf16* weight, int64_t ld, int64_t depth, float* sums, Ahead ahead);

// c [strips][tiles · 16][32] += g W for 32 rows of W (row stride ld elements) and `strips` strips of 32
// columns; g is [tiles · 16][32] with row stride ld_g. The columns of c are de-interleaved (see Strip).
void small_backward(const bf16* g, int64_t ld_g, const bf16* weight, int64_t ld, int64_t strips,
                    int64_t tiles, float* c);

}  // namespace lora_fast
