// The products of few_tokens.h by vectors, each W's own lanes: pairs of bfloat16 or float32. What the two and
// the instruction sets differ in is a Unit:
//   Row     an element of W's rows and of the columns that they are multiplied with
//   Vector  one register of them, of kLanes 32-bit words
//   Words   the same as integers
//   Sum     as many float32 sums
//   kColumns, kTokens   as many sums stay in registers, forward kDotRows · kColumns, backward 2 · kTokens
#include "few_tokens.h"

#include <algorithm>

#include "rank_tile.h"
#if LORA_FAST_HAS_AVX512_BF16
#include "tiles.h"
#endif

namespace lora_fast {
namespace {

template <class V, class W, int64_t columns, int64_t tokens>
struct Floats {
  using Row = float;
  using Vector = V;
  using Words = W;
  using Sum = V;
  static constexpr int64_t kLanes = sizeof(V) / 4, kColumns = columns, kTokens = tokens;

  static LORA_FAST_INLINE Sum add(Sum sum, Vector x, Vector y) { return sum + x * y; }
};

#if LORA_FAST_HAS_AVX512_BF16
struct Pairs {
  using Row = bf16;
  using Vector = short __attribute__((vector_size(64)));
  using Words = u32x16;
  using Sum = f32x16;
  static constexpr int64_t kLanes = 16, kColumns = 6, kTokens = 8;

  static LORA_FAST_INLINE Sum add(Sum sum, Vector x, Vector y) {
    return (Sum)__builtin_ia32_dpbf16ps_v16sf((__v16sf)sum, (__m512bh)x, (__m512bh)y);
  }
};
#endif

// Whether rows of T are bfloat16 that is widened, by a shift or a mask.
template <class Unit, class T>
constexpr bool kWidensBf16 = std::is_same_v<T, bf16> && std::is_same_v<typename Unit::Row, float>;

// A word in every lane. As integers, because GCC makes such a vector of floats lane by lane.
template <class Unit>
LORA_FAST_INLINE typename Unit::Vector repeat(const float* word) {
  uint32_t bits;
  std::memcpy(&bits, word, sizeof(bits));
  return (typename Unit::Vector)(bits - typename Unit::Words{});
}

template <class Unit>
constexpr int64_t kStep = sizeof(typename Unit::Vector) / sizeof(typename Unit::Row);

// kDotRows rows of W in a stretch, and some rows that are fetched meanwhile.
template <class Unit>
struct Rows {
  const typename Unit::Row* at;
  int64_t ld, length;
  const char* next;
  int64_t fetched, next_stride, next_size;  // rows; bytes of a row and of an element

  LORA_FAST_INLINE typename Unit::Vector load(int64_t row, int64_t k) const {
    return load_bits<typename Unit::Vector>(at + row * ld + k);
  }
};

// sums[j · kDotRows + i] += row i times column j, for `count` columns of the rows' length, and with `squares`
// those of the rows behind them
template <class Unit, int64_t count, bool squares>
LORA_FAST_INLINE void add_columns(const Rows<Unit>& rows, const typename Unit::Row* columns,
                                  typename Unit::Sum* sums) {
  constexpr int64_t R = kDotRows;
  typename Unit::Sum acc[count + squares][R] = {};
  for (int64_t k = 0; k < rows.length; k += kStep<Unit>) {
    typename Unit::Vector w[R];
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      w[r] = rows.load(r, k);
      if (r < rows.fetched) __builtin_prefetch(rows.next + r * rows.next_stride + k * rows.next_size, 0, 2);
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < count; ++j) {
      const auto x = load_bits<typename Unit::Vector>(columns + j * rows.length + k);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) acc[j][r] = Unit::add(acc[j][r], w[r], x);
    }
    if constexpr (squares) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) acc[count][r] = Unit::add(acc[count][r], w[r], w[r]);
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < count + squares; ++j) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) sums[j * R + r] += acc[j][r];
  }
}

// The same for at most `most` columns, as many as there are
template <class Unit, int64_t most, bool squares>
LORA_FAST_INLINE void add_up_to(const Rows<Unit>& rows, const typename Unit::Row* columns, int64_t count,
                                typename Unit::Sum* sums) {
  if constexpr (most > 0) {
    if (count < most) return add_up_to<Unit, most - 1, squares>(rows, columns, count, sums);
  }
  add_columns<Unit, most, squares>(rows, columns, sums);
}

// The same for all columns: in whole groups, and then with the squares in the place of a column. Beside each
// group an even share of the kDotRows rows at `next` (row stride ld elements) is fetched.
template <class Unit, class T>
LORA_FAST_INLINE void add_groups(Rows<Unit> rows, const typename Unit::Row* columns, int64_t count,
                                 bool squares, const T* next, int64_t ld, typename Unit::Sum* sums) {
  constexpr int64_t R = kDotRows, most = Unit::kColumns;
  const int64_t groups = (count + (squares ? 1 : 0) + most - 1) / most;
  rows.next_stride = ld * static_cast<int64_t>(sizeof(T));
  rows.next_size = sizeof(T);
  for (int64_t g = 0; g < groups; ++g, count -= most, columns += most * rows.length, sums += most * R) {
    const int64_t first = R * g / groups;
    rows.next = reinterpret_cast<const char*>(next + first * ld);
    rows.fetched = R * (g + 1) / groups - first;
    if (count >= most) {
      add_columns<Unit, most, false>(rows, columns, sums);
    } else if (squares) {
      add_up_to<Unit, most - 1, true>(rows, columns, count, sums);
    } else {
      add_up_to<Unit, most - 1, false>(rows, columns, count, sums);
    }
  }
}

template <class Sum>
LORA_FAST_INLINE float sum_of(const Sum& v) {
  constexpr int64_t lanes = sizeof(Sum) / sizeof(float);
  float x[lanes];
  std::memcpy(x, &v, sizeof(v));
#pragma GCC unroll 8
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Rows of bfloat16 times one column of float32, which is in the order of strips. One column leaves the time
// to reading W: the rows are widened in registers, and not in memory first.
template <class Unit>
LORA_FAST_INLINE void forward_column(const bf16* weight, int64_t ld, int64_t row_count, const float* column,
                                     int64_t depth, float* c, int64_t ld_c) {
  constexpr int64_t R = 2, lanes = Unit::kLanes, parts = kLanes / lanes;
  const int64_t stretch = dot_stretch<float>(1);
  for (int64_t row = 0; row < row_count; row += R, weight += R * ld) {
    typename Unit::Sum sums[R] = {};
    for (int64_t begin = 0; begin < depth; begin += stretch) {
      typename Unit::Sum acc[R][parts][2] = {};
      for (int64_t k = begin; k < std::min(depth, begin + stretch); k += kStrip) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < parts; ++j) {
          const auto even = load_bits<typename Unit::Vector>(column + k + j * lanes);
          const auto odd = load_bits<typename Unit::Vector>(column + k + kLanes + j * lanes);
#pragma GCC unroll 8
          for (int64_t r = 0; r < R; ++r) {
            const auto w = load_bits<typename Unit::Words>(weight + r * ld + k + 2 * j * lanes);
            if (j == 0) __builtin_prefetch(weight + (R + r) * ld + k, 0, 2);
            acc[r][j][0] = Unit::add(acc[r][j][0], (typename Unit::Vector)(w << 16), even);
            acc[r][j][1] = Unit::add(acc[r][j][1], (typename Unit::Vector)(w & 0xffff0000u), odd);
          }
        }
      }
      for (int64_t r = 0; r < R; ++r)
        for (int64_t j = 0; j < parts; ++j) sums[r] += acc[r][j][0] + acc[r][j][1];
    }
    for (int64_t r = 0; r < R; ++r) c[(row + r) * ld_c] = sum_of(sums[r]);
  }
}

// A stretch of the columns stays in the first-level cache while it meets all the rows, kDotRows at a time.
// Meanwhile the rows are fetched that follow kAhead bytes of W later.
template <class Unit, class T>
LORA_FAST_INLINE void forward(const T* weight, int64_t ld, int64_t row_count, const DotColumns& columns,
                              float* c, int64_t ld_c, float* squares, float* room) {
  using Row = typename Unit::Row;
  using Sum = typename Unit::Sum;
  constexpr int64_t R = kDotRows, kAhead = 16384, size = sizeof(T);
  constexpr bool widens = sizeof(T) < sizeof(Row);
  const int64_t count = columns.count, depth = columns.depth, stretch = dot_stretch<Row>(columns.packed);
  const Row* at = static_cast<const Row*>(columns.data);
  if constexpr (kWidensBf16<Unit, T>) {
    if (columns.packed == 1 && squares == nullptr)
      return forward_column<Unit>(weight, ld, row_count, at, depth, c, ld_c);
  }
  const int64_t width = count + (squares != nullptr ? 1 : 0);
  const int64_t ahead = std::max(R, kAhead / (stretch * size) / R * R);  // rows
  alignas(64) Row widened[widens ? R * dot_stretch<Row>(1) : 1];
  Sum* sums = reinterpret_cast<Sum*>(room);
  std::memset(room, 0, static_cast<size_t>(row_count * width) * sizeof(Sum));
  for (int64_t k = 0; k < depth; k += stretch) {
    const int64_t length = std::min(stretch, depth - k);
    for (int64_t row = 0; row < row_count; row += R) {
      const T* from = weight + row * ld + k;
      Rows<Unit> rows{};
      rows.length = length;
      if constexpr (widens) {
        for (int64_t r = 0; r < R; ++r)
          for (int64_t i = 0; i < length; i += kStrip)
            store_packed<float>(widened + r * length + i, load_strip<float>(from + r * ld + i));
        rows.at = widened;
        rows.ld = length;
      } else {
        rows.at = from;
        rows.ld = ld;
      }
      const int64_t after = row + ahead, later = k + after / row_count * stretch;
      const T* next = weight + (later < depth ? later : row_count * ld) + after % row_count * ld;
      add_groups(rows, at + k * columns.packed, count, squares != nullptr, next, ld, sums + row * width);
    }
  }
  for (int64_t row = 0; row < row_count; row += R, sums += R * width) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t j = 0; j < count; ++j) c[(row + r) * ld_c + j] = sum_of(sums[j * R + r]);
      if (squares != nullptr) squares[row + r] = sum_of(sums[count * R + r]);
    }
  }
}

// What a strip of some rows of W is multiplied from, in words: the rows themselves, or pairs of them, in the
// order of strips.
template <class Unit, class T>
struct Operand {
  static constexpr int64_t kRowsEach = 4 / sizeof(typename Unit::Row);  // of a word
  const float* at;
  int64_t ld;
  alignas(64) float made[kSmallRows / kRowsEach * kStrip];

  LORA_FAST_INLINE void make(const T* weight, int64_t stride, int64_t words) {
    if constexpr (sizeof(T) == 4) {
      at = weight;
      ld = stride;
      return;
    }
    at = made;
    ld = kStrip;
    for (int64_t i = 0; i < words; ++i) {
      if constexpr (kRowsEach == 2) {
        store_pairs(load_bits<u32x16>(weight + 2 * i * stride),
                    load_bits<u32x16>(weight + (2 * i + 1) * stride), made + i * kStrip,
                    made + i * kStrip + kLanes);
      } else {
        store_packed<float>(made + i * kStrip, load_strip<float>(weight + i * stride));
      }
    }
  }
};

// c [count][32] += g · operand, two vectors of columns at a time; g in words, row stride ld_g
template <class Unit, int64_t count>
LORA_FAST_INLINE void add_tokens(const float* g, int64_t ld_g, const float* operand, int64_t ld,
                                 int64_t words, float* c) {
  constexpr int64_t lanes = Unit::kLanes;
  for (int64_t j = 0; j < kStrip; j += 2 * lanes) {
    typename Unit::Sum acc[count][2] = {};
    for (int64_t i = 0; i < words; ++i) {
      const auto low = load_bits<typename Unit::Vector>(operand + i * ld + j);
      const auto high = load_bits<typename Unit::Vector>(operand + i * ld + j + lanes);
#pragma GCC unroll 8
      for (int64_t t = 0; t < count; ++t) {
        const auto x = repeat<Unit>(g + t * ld_g + i);
        acc[t][0] = Unit::add(acc[t][0], x, low);
        acc[t][1] = Unit::add(acc[t][1], x, high);
      }
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < count; ++t) {
      float* sums = c + t * kStrip + j;
      store_bits(sums, load_bits<typename Unit::Sum>(sums) + acc[t][0]);
      store_bits(sums + lanes, load_bits<typename Unit::Sum>(sums + lanes) + acc[t][1]);
    }
  }
}

template <class Unit, int64_t most>
LORA_FAST_INLINE void add_tokens_up_to(const float* g, int64_t ld_g, const float* operand, int64_t ld,
                                       int64_t words, int64_t count, float* c) {
  if constexpr (most > 1) {
    if (count < most) return add_tokens_up_to<Unit, most - 1>(g, ld_g, operand, ld, words, count, c);
  }
  add_tokens<Unit, most>(g, ld_g, operand, ld, words, c);
}

// Rows of W that are read side by side where the time goes into that: fewer are quicker.
constexpr int64_t kFewRows = 8;
constexpr int64_t kAhead = 4;  // strips: more rows are read side by side than the processor follows itself

// c [strips][32] += g W for one token and 32 rows of bfloat16, which are widened in registers too
template <class Unit>
LORA_FAST_INLINE void backward_token(const float* g, const bf16* weight, int64_t ld, int64_t strips,
                                     float* c) {
  constexpr int64_t lanes = Unit::kLanes;
  for (int64_t row = 0; row < kSmallRows; row += kFewRows, g += kFewRows, weight += kFewRows * ld) {
    typename Unit::Vector factors[kFewRows];
    for (int64_t r = 0; r < kFewRows; ++r) factors[r] = repeat<Unit>(g + r);
    for (int64_t s = 0; s < strips; ++s) {
      const bf16* from = weight + s * kStrip;
#pragma GCC unroll 8
      for (int64_t j = 0; j < kLanes; j += lanes) {
        float* sums = c + s * kStrip + j;
        typename Unit::Sum even{}, odd{};
#pragma GCC unroll 8
        for (int64_t r = 0; r < kFewRows; ++r) {
          if (j == 0) __builtin_prefetch(from + r * ld + kAhead * kStrip, 0, 2);
          const auto w = load_bits<typename Unit::Words>(from + r * ld + 2 * j);
          even = Unit::add(even, factors[r], (typename Unit::Vector)(w << 16));
          odd = Unit::add(odd, factors[r], (typename Unit::Vector)(w & 0xffff0000u));
        }
        store_bits(sums, load_bits<typename Unit::Sum>(sums) + even);
        store_bits(sums + kLanes, load_bits<typename Unit::Sum>(sums + kLanes) + odd);
      }
    }
  }
}

template <class Unit, class T>
LORA_FAST_INLINE void backward(const T* g, int64_t ld_g, const T* weight, int64_t ld, int64_t strips,
                               int64_t tokens, float* c) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t words_of_all = kSmallRows / Operand<Unit, T>::kRowsEach;
  Operand<Unit, T> operand;
  alignas(64) float packed[kSmallTokens * words_of_all];  // g
  for (int64_t t = 0; t < tokens; ++t) {
    if constexpr (sizeof(T) == sizeof(typename Unit::Row)) {
      std::memcpy(packed + t * words_of_all, g + t * ld_g, kSmallRows * sizeof(T));
    } else {
      for (int64_t i = 0; i < kSmallRows; i += kLanes)
        store<float>(packed + t * words_of_all + i, load<float>(g + t * ld_g + i));
    }
  }
  if constexpr (kWidensBf16<Unit, T>) {
    if (tokens == 1) return backward_token<Unit>(packed, weight, ld, strips, c);
  }
  const int64_t rows = tokens <= kFewest ? kFewRows : kSmallRows, words = rows / Operand<Unit, T>::kRowsEach;
  // the processor itself follows a few rows of float32 that nothing delays
  const bool fetch = sizeof(T) == 2 || tokens > kFewest;
  for (int64_t row = 0; row < kSmallRows; row += rows) {
    const float* factors = packed + row / Operand<Unit, T>::kRowsEach;
    const T* from = weight + row * ld;
    for (int64_t s = 0; s < strips; ++s, from += kStrip) {
      for (int64_t i = 0; fetch && i < rows; ++i)
        for (int64_t line = 0; line < kStrip; line += kLine)
          __builtin_prefetch(from + i * ld + kAhead * kStrip + line, 0, 2);
      operand.make(from, ld, words);
      for (int64_t t = 0; t < tokens; t += Unit::kTokens)
        add_tokens_up_to<Unit, Unit::kTokens>(factors + t * words_of_all, words_of_all, operand.at,
                                              operand.ld, words, tokens - t, c + (s * tokens + t) * kStrip);
    }
  }
}

#define LORA_FAST_DOT(target, T, ...)                                                                \
  target void forward_for(const T* weight, int64_t ld, int64_t row_count, const DotColumns& columns, \
                          float* c, int64_t ld_c, float* squares, float* room) {                     \
    forward<__VA_ARGS__>(weight, ld, row_count, columns, c, ld_c, squares, room);                    \
  }                                                                                                  \
  target void backward_for(const T* g, int64_t ld_g, const T* weight, int64_t ld, int64_t strips,    \
                           int64_t tokens, float* c) {                                               \
    backward<__VA_ARGS__>(g, ld_g, weight, ld, strips, tokens, c);                                   \
  }
#define LORA_FAST_DOT_OF_EACH(target, ...)  \
  LORA_FAST_DOT(target, float, __VA_ARGS__) \
  LORA_FAST_DOT(target, bf16, __VA_ARGS__)  \
  LORA_FAST_DOT(target, f16, __VA_ARGS__)

using f32x8 = float __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
using u32x4 = uint32_t __attribute__((vector_size(16)));
using Floats512 = Floats<f32x16, u32x16, 6, 8>;
using Floats256 = Floats<f32x8, u32x8, 3, 5>;
using Floats128 = Floats<f32x4, u32x4, 2, 5>;
#if LORA_FAST_HAS_CLONES
LORA_FAST_DOT_OF_EACH(__attribute__((target("arch=x86-64-v4"))), Floats512)
LORA_FAST_DOT_OF_EACH(__attribute__((target("arch=x86-64-v3"))), Floats256)
LORA_FAST_DOT_OF_EACH(__attribute__((target("default"))), Floats128)
#elif defined(__AVX512F__)
LORA_FAST_DOT_OF_EACH(, Floats512)
#elif defined(__AVX2__)
LORA_FAST_DOT_OF_EACH(, Floats256)
#else
LORA_FAST_DOT_OF_EACH(, Floats128)
#endif

#if LORA_FAST_HAS_AVX512_BF16
LORA_FAST_AVX512_BF16 void pairs_forward(const bf16* weight, int64_t ld, int64_t row_count,
                                         const DotColumns& columns, float* c, int64_t ld_c, float* squares,
                                         float* room) {
  forward<Pairs>(weight, ld, row_count, columns, c, ld_c, squares, room);
}
LORA_FAST_AVX512_BF16 void pairs_backward(const bf16* g, int64_t ld_g, const bf16* weight, int64_t ld,
                                          int64_t strips, int64_t tokens, float* c) {
  backward<Pairs>(g, ld_g, weight, ld, strips, tokens, c);
}
#endif

}  // namespace

template <class T>
void dot_forward(const T* weight, int64_t ld, int64_t row_count, const DotColumns& columns, float* c,
                 int64_t ld_c, float* squares, float* room) {
#if LORA_FAST_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>) {
    if (products_of<T>() == Products::pairs)
      return pairs_forward(weight, ld, row_count, columns, c, ld_c, squares, room);
  }
#endif
  forward_for(weight, ld, row_count, columns, c, ld_c, squares, room);
}

template <class T>
void dot_backward(const T* g, int64_t ld_g, const T* weight, int64_t ld, int64_t strips, int64_t tokens,
                  float* c) {
#if LORA_FAST_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>) {
    if (products_of<T>() == Products::pairs) return pairs_backward(g, ld_g, weight, ld, strips, tokens, c);
  }
#endif
  backward_for(g, ld_g, weight, ld, strips, tokens, c);
}

#define LORA_FAST_INSTANTIATE(T)                                                                             \
  template void dot_forward(const T*, int64_t, int64_t, const DotColumns&, float*, int64_t, float*, float*); \
  template void dot_backward(const T*, int64_t, const T*, int64_t, int64_t, int64_t, float*);
LORA_FAST_INSTANTIATE(float)
LORA_FAST_INSTANTIATE(bf16)
LORA_FAST_INSTANTIATE(f16)

}  // namespace lora_fast
