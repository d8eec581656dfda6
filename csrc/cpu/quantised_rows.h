// 32 rows of a quantised W: in memory, for products that read them there, or multiplied as they are made.
#pragma once

#include "few_tokens.h"
#include "quantised_weight.h"

namespace lora_fast {

// out [32][K] = W's rows from row n on, of T float, bf16 or f16, which is W's dtype; K a multiple of 32
template <class T>
void make_rows(const QuantisedWeight& w, int64_t n, T* out);

// Whether codes_forward is to multiply by as many columns: kFewest at most, which leave the time to making
// the rows, with the vectors of AVX-512.
template <class T>
bool multiplies_codes(const QuantisedWeight& w, int64_t columns);

// c [32][ld_c] = the product of W's rows from row n on, which go through no memory, with all the columns
template <class T>
void codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns, float* c, int64_t ld_c);

// The same by the instructions of AVX512-BF16, for blocks of whole strips.
void make_pair_rows(const QuantisedWeight& w, int64_t n, bf16* out);
void pair_codes_forward(const QuantisedWeight& w, int64_t n, const DotColumns& columns, float* c,
                        int64_t ld_c);

}  // namespace lora_fast
