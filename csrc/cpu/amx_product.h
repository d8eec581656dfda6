// Blocks of a product from packed operands, bfloat16 on AMX with sums in float32. panel_product runs inside
// an AmxScope of step kDepth, which makes every tile 16 rows of 64 bytes.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "rank_tile_amx.h"

namespace lora_fast {

// Rows or columns of a panel, two tiles; a block of the product is a panel of each.
constexpr int64_t kPanel = 32;
// What one step sums over.
constexpr int64_t kDepth = 32;
constexpr int64_t kPanelStep = kPanel * kDepth;  // elements of a panel in one step
constexpr int64_t kBlock = kPanel * kPanel;

// The operands of one block: a [steps][2][16 rows][32], b [steps][2][16 pairs][16 columns][2].
struct Panels {
  const bf16 *a, *b;
  int64_t steps;
};

// The operand that changes with each iteration of a loop over blocks: its loads leave the first-level cache
// to the other.
enum class Streamed { a, b };

// c [2][2][16][16] = or += the sum of the products
void panel_product(Streamed streamed, std::initializer_list<Panels> products, float* c, bool accumulate);

// Where a row of a panel lies, as 16 · tile + row: in order, or de-interleaved, even rows in the first tile
// and odd ones in the second, so that the columns of a transposed block are in the order of a strip (see
// Strip).
enum class RowOrder { plain, dealt };

// An a-panel from up to 32 rows of m (row stride ld), `steps` steps of 32 columns; missing rows are zero.
void pack_rows(const bf16* m, int64_t ld, int64_t rows, int64_t steps, RowOrder order, bf16* out);

// One tile of each step of a b-panel, `out_stride` elements apart: the columns are up to 16 rows of m, or
// none; missing ones are zero.
void pack_column_tile(const bf16* m, int64_t ld, int64_t rows, int64_t steps, bf16* out, int64_t out_stride);

// A b-panel whose columns are up to 32 rows of m; missing ones are zero.
void pack_columns(const bf16* m, int64_t ld, int64_t rows, int64_t steps, bf16* out);

// One step of the b-panels of `strips` strips of 32 columns, summed over up to 32 rows of m; missing rows are
// zero. Strip i goes to out + i · out_stride, its columns de-interleaved (see Strip).
void pack_pairs(const bf16* m, int64_t ld, int64_t rows, int64_t strips, bf16* out, int64_t out_stride);

}  // namespace lora_fast
