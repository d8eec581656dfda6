// The pairwise ways of rank_tile.h. AMX's tiles are configured once per thread and chunk.
#pragma once

#include <cstdint>

#include "vec.h"

namespace lora_fast {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileCols = 128;

// Where AMX is used and `active`: configures this thread's tiles for steps of the given depth, and releases
// them at the end of the scope.
class AmxScope {
 public:
  AmxScope(bool active, int64_t step);
  ~AmxScope();
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;

 private:
  [[maybe_unused]] bool active_;  // not read where AMX is not compiled in
};

// c [rows][kTileCols] = P Q, see RankLayout; p holds 16 or 32 rows, whichever covers rows.
void amx_rank_tile(const bf16* p, const bf16* panel, int64_t steps, int64_t step, float* c, int64_t rows,
                   int64_t cols);
void avx512_bf16_rank_tile(const bf16* p, const bf16* panel, int64_t steps, int64_t step, float* c,
                           int64_t rows, int64_t cols);

}  // namespace lora_fast
