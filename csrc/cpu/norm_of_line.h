// What the norms fall back on where a sum of squares in float cannot be trusted.
#pragma once

#include "adapted_weight.h"

namespace lora_fast {

// Sums of squares outside these are redone by norm_of_line: inside, no square has under- or overflowed
// that could be seen in the result.
inline bool needs_redo(double squares, bool wide) {
  return !(squares >= (wide ? 1e-280 : 1e-24) && squares <= (wide ? 1e300 : 1e36));
}

// One row (or column) of V in double, scaled by its largest entry, so that no square under- or overflows.
// buffer has room for two lines and R elements.
double norm_of_line(const AdaptedWeight& v, bool row, int64_t index, double* buffer);

// The same where the first line of the buffer holds W's.
double norm_of_held_line(const RankUpdate& v, bool row, int64_t index, double* buffer);

}  // namespace lora_fast
