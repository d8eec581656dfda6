// lora_linear for up to 32 tokens: one read of W, the rank step, gain and bias on the float32
// sums; with the norm, if it is asked for, from the same read. Of a quantised W 32 rows are made at a time.
#include <atomic>

#include "content_key.h"
#include "factored_norm.h"
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"
#include "quantised_rows.h"

namespace lora_fast {
namespace {

LORA_FAST_CLONES void deal_strips(const float* x, int64_t count, float* out) {
  std::copy_n(x, count, out);
  deal(out, count);
}

// What W is multiplied with: x's rows as columns, then those of the norm's parts of A. In tiles, two tiles of
// sixteen columns at a time share a read of W.
template <class T>
class Operand {
 public:
  Operand(const T* x, int64_t tokens, int64_t K, const FactoredNorm* norm)
      : how_(products_of<T>()),
        token_tiles_(round_up(tokens, kTokenTile) / kTokenTile),
        norm_column_(how_ == Products::tiles ? token_tiles_ * kTokenTile : tokens),
        tiles_(token_tiles_ + (norm != nullptr ? round_up(norm->columns(), kTokenTile) / kTokenTile : 0)),
        width_(how_ == Products::tiles ? tiles_ * kTokenTile
                                       : tokens + (norm != nullptr ? norm->columns() : 0)),
        K_(K),
        packed_(width_ * K * static_cast<int64_t>(how_ == Products::vectors ? sizeof(float) : sizeof(bf16))) {
    pack(x, tokens, norm);
  }

  Products how() const { return how_; }
  int64_t row_step() const { return how_ == Products::tiles ? kSmallRows : kDotRows; }
  DotColumns dot_columns() const { return {packed_.data(), width_, width_, K_}; }
  int64_t width() const { return width_; }
  int64_t norm_column() const { return norm_column_; }
  int64_t token_tiles() const { return token_tiles_; }
  int64_t room() const { return how_ == Products::tiles ? 0 : dot_room(kSmallRows, width_); }

  // c [32][width] = the product with 32 rows of W, and with a norm squares [32] = those of the rows. In tiles
  // the rows stay in the second-level cache from one pass to the next, and each pass fetches its share of the
  // next 32.
  void multiply(const T* weight, int64_t ld, float* c, float* squares, float* room) const {
    if (how_ != Products::tiles)
      return dot_forward(weight, ld, kSmallRows, dot_columns(), c, width_, squares, room);
    if constexpr (std::is_same_v<T, bf16>) multiply_tiles(weight, ld, c, squares);
  }

  // c [32][32] = the product with the tokens' rows of up to 32 rows of W, but a multiple of row_step()
  void multiply_tokens(const T* weight, int64_t ld, int64_t rows, int64_t tokens, float* c,
                       float* room) const {
    if (how_ != Products::tiles)
      return dot_forward(weight, ld, rows, {packed_.data(), width_, tokens, K_}, c, kSmallTokens, nullptr,
                         room);
    if constexpr (std::is_same_v<T, bf16>)
      tiles_forward(weight, ld, columns<bf16>(), tiles_of(0), K_, c, kSmallTokens,
                    {weight + kAhead, kSmallRows});
  }

 private:
  static constexpr int64_t kAhead = 256;  // elements of the same rows

  template <class Element>
  Element* columns() const {
    return static_cast<Element*>(static_cast<void*>(packed_.data()));
  }

  int64_t tiles_of(int64_t pair) const { return std::min<int64_t>(2, tiles_ - 2 * pair); }

  void pack(const T* x, int64_t tokens, const FactoredNorm* norm) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (how_ == Products::tiles) return pack_tiles(x, tokens, norm);
      if (how_ == Products::pairs) return pack_columns<bf16>(x, tokens, norm);
    }
    pack_columns<float>(x, tokens, norm);
  }

  void pack_tiles(const bf16* x, int64_t tokens, const FactoredNorm* norm) {
    const int64_t steps = K_ / kSmallDepth;
    for_chunks(chunk_count(steps, 32), steps, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const bool of_tokens = tile < token_tiles_;
        const int64_t row = (of_tokens ? tile : tile - token_tiles_) * kTokenTile, pair = tile / 2;
        const int64_t step_size = tiles_of(pair) * kTokenTile * kSmallDepth;
        pack_column_tile((of_tokens ? x : norm->parts()) + row * K_ + begin * kSmallDepth, K_,
                         (of_tokens ? tokens : norm->columns()) - row, end - begin,
                         columns<bf16>() + pair * 2 * kTokenTile * K_ + tile % 2 * kTokenTile * kSmallDepth +
                             begin * step_size,
                         step_size);
      }
    });
  }

  // See DotColumns
  template <class Element>
  void pack_columns(const T* x, int64_t tokens, const FactoredNorm* norm) {
    constexpr int64_t kGrain = 65536;  // elements that are worth a thread
    const int64_t stretch = dot_stretch<Element>(width_), count = (K_ + stretch - 1) / stretch;
    for_chunks(chunk_count(count, 1 + kGrain / (width_ * stretch)), count,
               [&](int64_t, int64_t begin, int64_t end) {
                 for (int64_t k = begin * stretch; k < std::min(K_, end * stretch); k += stretch) {
                   const int64_t length = std::min(stretch, K_ - k);
                   Element* out = columns<Element>() + k * width_;
                   for (int64_t t = 0; t < tokens; ++t, out += length)
                     pack_token(x + t * K_ + k, length, out);
                   for (int64_t j = tokens; j < width_; ++j, out += length)
                     pack_norm(*norm, (j - tokens) * K_ + k, length, out);
                 }
               });
  }

  template <class Element>
  static void pack_token(const T* x, int64_t count, Element* out) {
    if constexpr (std::is_same_v<T, Element>) {
      std::copy_n(x, count, out);
    } else {
      widen_strips(x, count, out);
    }
  }

  template <class Element>
  static void pack_norm(const FactoredNorm& norm, int64_t at, int64_t count, Element* out) {
    if constexpr (std::is_same_v<Element, bf16>) {
      std::copy_n(norm.parts() + at, count, out);
    } else if constexpr (sizeof(T) == 2) {
      deal_strips(norm.rows() + at, count, out);
    } else {
      std::copy_n(norm.rows() + at, count, out);
    }
  }

  void multiply_tiles(const bf16* weight, int64_t ld, float* c, float* squares) const {
    const int64_t pairs = (tiles_ + 1) / 2, passes = pairs + (squares != nullptr ? 1 : 0);
    const auto share = [&](int64_t pass) -> Ahead<bf16> {
      if (passes == 1) return {weight + kAhead, kSmallRows};
      const int64_t begin = pass * kSmallRows / passes;
      return {weight + (kSmallRows + begin) * ld, (pass + 1) * kSmallRows / passes - begin};
    };
    for (int64_t pair = 0; pair < pairs; ++pair)
      tiles_forward(weight, ld, columns<bf16>() + pair * 2 * kTokenTile * K_, tiles_of(pair), K_,
                    c + pair * 2 * kTokenTile, width_, share(pair));
    if (squares == nullptr) return;
    std::memset(squares, 0, kSmallRows * sizeof(float));
    tiles_squares(weight, ld, K_, squares, share(pairs));
  }

  Products how_;
  int64_t token_tiles_, norm_column_, tiles_, width_, K_;
  Scratch<char> packed_;
};

template <class T>
struct Small {
  const T* weight;                   // or null, and its rows are made of
  const QuantisedWeight* quantised;  // this
  int64_t ld, N, K, R, tokens;
  const Operand<T>* operand;
  const float* h;  // s h, [R][tokens in whole tiles]
  const void* lora_B;
  ScalarType dtype_B;
  const float *gain, *bias;  // may be null
  T *y, *product;
  const FactoredNorm* factored;  // null where the norm is not wanted; else
  const DoraGain* dora;          // whose norm and gain are written
  const Tensor* sampled;         // W, where its sample is wanted
  std::atomic<uint64_t>* sample;
};

// turned [tokens][32] = c [32][ld] + s h lora_Bᵀ, in the order of strips; b [32][R] is lora_B's
template <class T, int64_t tiles>
LORA_FAST_INLINE void add_update(const Small<T>& op, const float* c, int64_t ld, const float* b,
                                 float (*turned)[kStrip]) {
  constexpr int64_t width = tiles * kTokenTile, kRows = 4;  // rows whose additions do not wait for each other
  for (int64_t i = 0; i < kSmallRows; i += kRows) {
    f32x16 v[kRows][tiles];
    for (int64_t u = 0; u < kRows; ++u)
      for (int64_t tile = 0; tile < tiles; ++tile)
        v[u][tile] = load<float>(c + (i + u) * ld + tile * kTokenTile);
    for (int64_t r = 0; r < op.R; ++r) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const f32x16 h = load<float>(op.h + r * width + tile * kTokenTile);
#pragma GCC unroll 4
        for (int64_t u = 0; u < kRows; ++u) v[u][tile] += b[(i + u) * op.R + r] * h;
      }
    }
    for (int64_t u = 0; u < kRows; ++u) {
      const int64_t column = kDealt<T> ? dealt_position(i + u) : i + u;
      for (int64_t t = 0; t < op.tokens; ++t) turned[t][column] = v[u][t / kTokenTile][t % kTokenTile];
    }
  }
}

// 32 floats in the order of strips
template <class T>
LORA_FAST_INLINE Strip<float> load_in_order(const float* p) {
  Strip<float> strip = load_packed(p);
  if constexpr (kDealt<T>) deal_strip(strip.even, strip.odd);
  return strip;
}

// The sums of 32 outputs, c [32][ld], to y and product [tokens, N]; b [32][R] is room for lora_B's rows
template <class T>
LORA_FAST_CLONES void finish_rows(const Small<T>& op, const float* c, int64_t ld, int64_t n, float* b) {
  LORA_FAST_BY_DTYPE(op.dtype_B, B,
                     convert_line(b, static_cast<const B*>(op.lora_B) + n * op.R, 1, kSmallRows * op.R))
  alignas(64) float turned[kSmallTokens][kStrip];
  op.operand->token_tiles() > 1 ? add_update<T, 2>(op, c, ld, b, turned)
                                : add_update<T, 1>(op, c, ld, b, turned);
  Strip<float> gain{splat(1.0f), splat(1.0f)}, bias{};
  if (op.gain != nullptr) gain = load_in_order<T>(op.gain + n);
  if (op.bias != nullptr) bias = load_in_order<T>(op.bias + n);
  for (int64_t t = 0; t < op.tokens; ++t) {
    Strip<float> v = load_packed(&turned[t][0]);
    if (op.product != nullptr) store_strip<float>(op.product + t * op.N + n, v);
    v = {v.even * gain.even + bias.even, v.odd * gain.odd + bias.odd};
    store_strip<float>(op.y + t * op.N + n, v);
  }
}

template <class T>
void forward_rows(const Small<T>& op, int64_t begin, int64_t end) {
  const int64_t width = op.operand->width();
  const bool by_codes = op.quantised != nullptr && multiplies_codes<T>(*op.quantised, width);
  const Scratch<T> made(op.quantised != nullptr && !by_codes ? kSmallRows * op.K : 0);
  const Scratch<float> c(kSmallRows * width + kSmallTokens);  // the last row is read in whole tiles
  const Scratch<float> b(kSmallRows * op.R), room(op.operand->room());
  const AmxScope scope(op.operand->how() == Products::tiles, kSmallDepth);
  for (int64_t n = begin * kSmallRows; n < end * kSmallRows; n += kSmallRows) {
    float squares[kSmallRows];
    if (by_codes) {
      codes_forward<T>(*op.quantised, n, op.operand->dot_columns(), c.data(), width);
    } else {
      if (op.quantised != nullptr) make_rows(*op.quantised, n, made.data());
      op.operand->multiply(op.quantised != nullptr ? made.data() : op.weight + n * op.ld, op.ld, c.data(),
                           op.factored != nullptr ? squares : nullptr, room.data());
    }
    if (op.factored != nullptr) {
      op.factored->finish(n, squares, c.data() + op.operand->norm_column(), width, op.dora->magnitude + n,
                          op.dora->norm + n, op.dora->gain.data() + n);
    }
    finish_rows(op, c.data(), width, n, b.data());
    // while the rows are in the cache
    if (op.sampled != nullptr) *op.sample += sample_of_rows(*op.sampled, n, n + kSmallRows);
  }
}

// Rows of c [count][32], rounded to T: h [tokens, R] from column r on, and s times them, scaled_h [R][width]
template <class T>
LORA_FAST_CLONES void store_projection(const float* c, int64_t count, int64_t tokens, int64_t r, int64_t R,
                                       float scaling, int64_t width, T* h, float* scaled_h) {
  for (int64_t i = 0; i < count; ++i) {
    T rounded[kSmallTokens];
    for (int64_t t = 0; t < width; t += kTokenTile) {
      store<float>(rounded + t, load<float>(c + i * kSmallTokens + t));
      store<float>(scaled_h + (r + i) * width + t, scaling * load<float>(rounded + t));
    }
    for (int64_t t = 0; t < tokens; ++t) h[t * R + r + i] = rounded[t];
  }
}

// h = x lora_Aᵀ as [tokens, R], and s times it as [R][tokens in whole tiles] in float32
template <class T>
void project(const Operand<T>& operand, int64_t tokens, const Tensor& lora_A, double scaling, T* h,
             float* scaled_h) {
  const int64_t R = lora_A.size(0), K = lora_A.size(1);
  const WholeRows<T> rows(AdapterMatrix{lora_A}, operand.row_step());
  alignas(64) float c[kSmallRows * kSmallTokens] = {};
  const Scratch<float> room(operand.room());
  const AmxScope scope(operand.how() == Products::tiles, kSmallDepth);
  for (int64_t r = 0; r < R; r += kSmallRows) {
    operand.multiply_tokens(rows.data() + r * K, K, std::min(kSmallRows, rows.count() - r), tokens, c,
                            room.data());
    store_projection(c, std::min(kSmallRows, R - r), tokens, r, R, static_cast<float>(scaling),
                     operand.token_tiles() * kTokenTile, h, scaled_h);
  }
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
               double scaling, const float* gain, const std::optional<Tensor>& bias, Tensor& y,
               std::optional<Tensor>& product, const DoraGain* dora, uint64_t* sample) {
  const int64_t tokens = x.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  const int64_t h_size[] = {tokens, R};
  Tensor h = torch::stable::new_empty(x, {h_size, 2});
  const Scratch<float> scaled_h(R * round_up(tokens, kTokenTile));
  std::optional<FactoredNorm> factored;
  if (dora != nullptr && !dora->known)
    factored.emplace(weight, lora_A, lora_B, scaling, products_of<T>() != Products::vectors);
  const Operand<T> operand(data_of<T>(x), tokens, K, factored ? &*factored : nullptr);
  std::atomic<uint64_t> sum = 0;
  const Small<T> op{data_of<T>(weight),
                    nullptr,
                    weight.stride(0),
                    N,
                    K,
                    R,
                    tokens,
                    &operand,
                    scaled_h.data(),
                    lora_B.const_data_ptr(),
                    lora_B.scalar_type(),
                    gain,
                    bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                    static_cast<T*>(y.mutable_data_ptr()),
                    product ? static_cast<T*>(product->mutable_data_ptr()) : nullptr,
                    factored ? &*factored : nullptr,
                    dora,
                    sample != nullptr ? &weight : nullptr,
                    &sum};
  project(operand, tokens, lora_A, scaling, static_cast<T*>(h.mutable_data_ptr()), scaled_h.data());
  for_chunks(chunk_count(N / kSmallRows, blocks_of_a_thread<T>(K)), N / kSmallRows,
             [&](int64_t, int64_t begin, int64_t end) { forward_rows(op, begin, end); });
  if (sample != nullptr) *sample = sum;
  return h;
}

template <class T>
Tensor quantised_forward(const Tensor& x, const QuantisedWeight& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const float* gain, const float* bias) {
  const int64_t tokens = x.size(0), N = weight.rows, K = weight.cols, R = weight.rank;
  const int64_t size[] = {tokens, N};
  Tensor y = torch::stable::new_empty(x, {size, 2});
  const Scratch<float> scaled_h(R * round_up(tokens, kTokenTile));
  const Scratch<T> h(tokens * R);
  const Operand<T> operand(data_of<T>(x), tokens, K, nullptr);
  const Small<T> op{nullptr,
                    &weight,
                    K,
                    N,
                    K,
                    R,
                    tokens,
                    &operand,
                    scaled_h.data(),
                    lora_B.const_data_ptr(),
                    lora_B.scalar_type(),
                    gain,
                    bias,
                    static_cast<T*>(y.mutable_data_ptr()),
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr};
  project(operand, tokens, lora_A, weight.scaling, h.data(), scaled_h.data());
  for_chunks(chunk_count(N / kSmallRows, blocks_of_a_thread<T>(K)), N / kSmallRows,
             [&](int64_t, int64_t begin, int64_t end) { forward_rows(op, begin, end); });
  return y;
}

}  // namespace

Tensor cpu::quantised_linear_small_fwd(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> levels,
                                       Tensor lora_A, Tensor lora_B, double scaling,
                                       std::optional<Tensor> gain, std::optional<Tensor> bias) {
  check_few_tokens(x, "x");
  check_contiguous(x, "x");
  check_quantised(codes, scale, levels, lora_A, lora_B);
  const int64_t N = lora_B.size(0), K = lora_A.size(1);
  check_size(x, "x", 1, K);
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double && N % kSmallRows == 0 && K % kSmallDepth == 0,
                  "x must be float32, bfloat16 or float16 and W of whole tiles of 32, got ", N, " x ", K);
  check_contiguous(lora_A, "lora_A");
  check_contiguous(lora_B, "lora_B");
  if (gain) check_float_vector(*gain, "gain", N);
  if (bias) check_float_vector(*bias, "bias", N);
  const QuantisedWeight weight(codes, scale, levels, x.scalar_type(), lora_A, lora_B, scaling);
  const float* gains = gain ? data_of<float>(*gain) : nullptr;
  const float* biases = bias ? data_of<float>(*bias) : nullptr;
  LORA_FAST_BY_SHORT_DTYPE(x.scalar_type(), T,
                           return quantised_forward<T>(x, weight, lora_A, lora_B, gains, biases))
}

Tensor cpu::lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                                  std::optional<Tensor> gain, std::optional<Tensor> bias, Tensor y,
                                  std::optional<Tensor> product) {
  check_few_tokens(x, "x");
  check_few_tokens_weight(weight);
  check_linear_fwd(x, weight, lora_A, lora_B, gain, bias, y, product);
  const float* gains = gain ? data_of<float>(*gain) : nullptr;
  LORA_FAST_BY_SHORT_DTYPE(
      weight.scalar_type(), T,
      return forward<T>(x, weight, lora_A, lora_B, scaling, gains, bias, y, product, nullptr, nullptr))
}

Tensor cpu::dora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                                  Tensor magnitude, std::optional<Tensor> bias, Tensor y,
                                  std::optional<Tensor> product, Tensor norm, std::optional<Tensor> kept_norm,
                                  std::optional<Tensor> kept_key, int64_t version) {
  check_few_tokens(x, "x");
  check_few_tokens_weight(weight);
  check_linear_fwd(x, weight, lora_A, lora_B, magnitude, bias, y, product, "magnitude");
  check_float_vector(norm, "norm", weight.size(0));
  STD_TORCH_CHECK(kept_norm.has_value() == kept_key.has_value(), "kept_norm and kept_key go together");
  const auto run = [&](bool norm_known, uint64_t* sample) {
    const DoraGain dora(magnitude, norm, norm_known);
    LORA_FAST_BY_SHORT_DTYPE(weight.scalar_type(), T,
                             return forward<T>(x, weight, lora_A, lora_B, scaling, dora.gain.data(), bias, y,
                                               product, &dora, sample))
  };
  if (!kept_norm) return run(false, nullptr);
  // W's sample, a read of a page for each of its elements, is taken from the rows as they pass: the kept norm
  // is used on trust, and the result thrown away if the sample is another.
  ContentKey key = key_without_sample(weight, lora_A, lora_B, scaling, true, version);
  const auto kept_sample = load_kept_norm_but_for_sample(*kept_norm, *kept_key, key, norm);
  if (kept_sample) {
    const Tensor h = run(true, &key.sample);
    if (key.sample == *kept_sample) return h;
  }
  const Tensor h = run(false, &key.sample);
  keep_norm_of(*kept_norm, *kept_key, key, norm);
  return h;
}

}  // namespace lora_fast
