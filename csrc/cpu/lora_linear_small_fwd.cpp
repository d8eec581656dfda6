// lora_linear for up to 32 tokens in bfloat16: one read of W, the rank step, gain and bias on the float32
// sums; with the norm, if it is asked for, from the same read.
#include <atomic>

#include "content_key.h"
#include "factored_norm.h"
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// Sixteen rows of x [16][depth], the blocks [begin, end) of 32 columns, as pairs of a packed operand (see
// small_forward) of `tiles` tiles; packed is the tile's own place in the first block.
LORA_FAST_CLONES void pack_tile(const bf16* x, int64_t depth, int64_t tiles, bf16* packed, int64_t begin,
                                int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    bf16* out = packed + block * tiles * kSmallDepth * kTokenTile;
    for (int half = 0; half < 2; ++half) {
      u32x16 words[8];
      transpose_words(x + block * kSmallDepth + half * 16, depth * 2, words);
      for (int p = 0; p < 8; ++p) store_bits(out + (half * 8 + p) * 32, words[p]);
    }
  }
}

// What W is multiplied with, in tiles of sixteen rows of length K: the tokens', then those of the norm's
// parts of A. Two tiles at a time share a read of W.
class Operand {
 public:
  Operand(const bf16* x, int64_t tokens, int64_t K, const FactoredNorm* norm)
      : tokens_(round_up(tokens, kTokenTile) / kTokenTile),
        tiles_(tokens_ + (norm != nullptr ? round_up(norm->columns(), kTokenTile) / kTokenTile : 0)),
        K_(K),
        packed_(tiles_ * kTokenTile * K) {
    const PaddedRows rows(x, tokens, K, kTokenTile);
    const int64_t blocks = K / kSmallDepth;
    for_chunks(chunk_count(blocks, 32), blocks, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const bf16* from = tile < tokens_ ? rows.data() + tile * kTokenTile * K
                                          : norm->parts() + (tile - tokens_) * kTokenTile * K;
        const int64_t pair = tile / 2;
        pack_tile(from, K, tiles_of(pair),
                  packed_.data() + pair * 2 * kTokenTile * K + tile % 2 * kTokenTile * kSmallDepth, begin,
                  end);
      }
    });
  }

  int64_t width() const { return tiles_ * kTokenTile; }
  // of the tokens' part
  int64_t token_width() const { return tokens_ * kTokenTile; }

  // c [32][width] = the product with 32 rows of W, and with a norm squares [32] = those of the rows. They
  // stay in the second-level cache from one pass to the next, and each pass fetches its share of the next 32.
  void multiply(const bf16* weight, int64_t ld, float* c, float* squares) const {
    const int64_t pairs = (tiles_ + 1) / 2, passes = pairs + (squares != nullptr ? 1 : 0);
    const auto share = [&](int64_t pass) -> Ahead {
      if (passes == 1) return {weight + kAhead, kSmallRows};
      const int64_t begin = pass * kSmallRows / passes;
      return {weight + (kSmallRows + begin) * ld, (pass + 1) * kSmallRows / passes - begin};
    };
    for (int64_t pair = 0; pair < pairs; ++pair)
      small_forward(weight, ld, packed_.data() + pair * 2 * kTokenTile * K_, tiles_of(pair), K_,
                    c + pair * 2 * kTokenTile, width(), share(pair));
    if (squares == nullptr) return;
    std::memset(squares, 0, kSmallRows * sizeof(float));
    row_squares(weight, ld, K_, squares, share(pairs));
  }

  // c [32][32] = the product of the first two tiles, which hold all tokens
  void multiply_tokens(const bf16* weight, int64_t ld, float* c) const {
    small_forward(weight, ld, packed_.data(), tiles_of(0), K_, c, kSmallTokens,
                  {weight + kAhead, kSmallRows});
  }

 private:
  static constexpr int64_t kAhead = 256;  // elements of the same rows

  int64_t tiles_of(int64_t pair) const { return std::min<int64_t>(2, tiles_ - 2 * pair); }

  int64_t tokens_, tiles_, K_;
  Scratch<bf16> packed_;
};

struct Small {
  const bf16* weight;
  int64_t ld, N, K, R, tokens;
  const Operand* operand;
  const float* h;      // s h, [R][tiles · 16]
  const bf16* lora_B;  // [N, R]
  const float *gain, *bias;
  bf16 *y, *product;
  const FactoredNorm* factored;  // null where the norm is not wanted; else
  const DoraGain* dora;          // whose norm and gain are written
  const Tensor* sampled;         // W, where its sample is wanted
  std::atomic<uint64_t>* sample;
};

// turned [tokens][32] = c [32][ld] + s h lora_Bᵀ, the columns de-interleaved (see Strip).
template <int64_t tiles>
LORA_FAST_INLINE void add_update(const Small& op, const float* c, int64_t ld, int64_t n,
                                 float (*turned)[kStrip]) {
  constexpr int64_t width = tiles * kTokenTile;
  for (int64_t i = 0; i < kSmallRows; ++i) {
    const bf16* b = op.lora_B + (n + i) * op.R;
    f32x16 v[tiles];
    for (int64_t tile = 0; tile < tiles; ++tile) v[tile] = load<float>(c + i * ld + tile * kTokenTile);
    for (int64_t r = 0; r < op.R; ++r)
      for (int64_t tile = 0; tile < tiles; ++tile)
        v[tile] += widen_one(b[r]) * load<float>(op.h + r * width + tile * kTokenTile);
    const int64_t column = dealt_position(i);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t t = 0; t < kTokenTile; ++t) turned[tile * kTokenTile + t][column] = v[tile][t];
  }
}

// The sums of 32 outputs, c [32][ld], to y and product [tokens, N].
LORA_FAST_CLONES void finish_rows(const Small& op, const float* c, int64_t ld, int64_t n) {
  alignas(64) float turned[kSmallTokens][kStrip];
  op.operand->token_width() > kTokenTile ? add_update<2>(op, c, ld, n, turned)
                                         : add_update<1>(op, c, ld, n, turned);
  Strip<float> gain = load_packed(op.gain + n), bias{};
  deal_strip(gain.even, gain.odd);
  if (op.bias != nullptr) {
    bias = load_packed(op.bias + n);
    deal_strip(bias.even, bias.odd);
  }
  for (int64_t t = 0; t < op.tokens; ++t) {
    Strip<float> v = load_packed(&turned[t][0]);
    if (op.product != nullptr) store_strip<float>(op.product + t * op.N + n, v);
    v = {v.even * gain.even + bias.even, v.odd * gain.odd + bias.odd};
    store_strip<float>(op.y + t * op.N + n, v);
  }
}

void forward_rows(const Small& op, int64_t begin, int64_t end) {
  const int64_t width = op.operand->width();
  const Scratch<float> c(kSmallRows * width);
  const AmxScope scope(true, kSmallDepth);
  for (int64_t n = begin * kSmallRows; n < end * kSmallRows; n += kSmallRows) {
    const bf16* weight = op.weight + n * op.ld;
    float squares[kSmallRows];
    op.operand->multiply(weight, op.ld, c.data(), op.factored != nullptr ? squares : nullptr);
    if (op.factored != nullptr) {
      op.factored->finish(n, kSmallRows, squares, c.data() + op.operand->token_width(), width,
                          op.dora->magnitude + n, op.dora->norm + n, op.dora->gain.data() + n);
    }
    finish_rows(op, c.data(), width, n);
    // while the rows are in the cache
    if (op.sampled != nullptr) *op.sample += sample_of_rows(*op.sampled, n, n + kSmallRows);
  }
}

// h = x lora_Aᵀ as [tokens, R] in bfloat16, and s times it as [R][tiles · 16] in float32
void project(const Operand& operand, int64_t tokens, const AdapterMatrix& lora_A, double scaling, bf16* h,
             float* scaled_h) {
  const int64_t R = lora_A.rows, K = lora_A.cols;
  const Scratch<bf16> rows(round_up(R, kSmallRows) * K);
  for_chunks(chunk_count(R, 8), R, [&](int64_t, int64_t begin, int64_t end) {
    round_rows(lora_A, begin, end - begin, 1.0f, false, K, rows.data() + begin * K);
  });
  std::memset(rows.data() + R * K, 0, static_cast<size_t>((round_up(R, kSmallRows) - R) * K) * sizeof(bf16));
  alignas(64) float c[kSmallRows * kSmallTokens];
  const AmxScope scope(true, kSmallDepth);
  const int64_t width = operand.token_width();
  for (int64_t r0 = 0; r0 < R; r0 += kSmallRows) {
    operand.multiply_tokens(rows.data() + r0 * K, K, c);
    for (int64_t r = r0; r < std::min(R, r0 + kSmallRows); ++r) {
      for (int64_t t = 0; t < width; ++t) {
        const bf16 rounded = narrow_one(c[(r - r0) * kSmallTokens + t]);
        if (t < tokens) h[t * R + r] = rounded;
        scaled_h[r * width + t] = static_cast<float>(scaling) * widen_one(rounded);
      }
    }
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
               double scaling, const float* gain, const std::optional<Tensor>& bias, Tensor& y,
               std::optional<Tensor>& product, const DoraGain* dora, uint64_t* sample) {
  const int64_t tokens = x.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  const int64_t h_size[] = {tokens, R};
  Tensor h = torch::stable::new_empty(x, {h_size, 2});
  const Scratch<float> scaled_h(R * round_up(tokens, kTokenTile));
  const RoundedMatrix rounded_B(AdapterMatrix{lora_B});
  std::optional<FactoredNorm> factored;
  if (dora != nullptr && !dora->known) factored.emplace(weight, lora_A, lora_B, scaling);
  const Operand operand(elements(x), tokens, K, factored ? &*factored : nullptr);
  std::atomic<uint64_t> sum = 0;
  const Small op{elements(weight),
                 weight.stride(0),
                 N,
                 K,
                 R,
                 tokens,
                 &operand,
                 scaled_h.data(),
                 rounded_B.data(),
                 gain,
                 bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                 static_cast<bf16*>(y.mutable_data_ptr()),
                 product ? static_cast<bf16*>(product->mutable_data_ptr()) : nullptr,
                 factored ? &*factored : nullptr,
                 dora,
                 sample != nullptr ? &weight : nullptr,
                 &sum};
  project(operand, tokens, AdapterMatrix(lora_A), scaling, static_cast<bf16*>(h.mutable_data_ptr()),
          scaled_h.data());
  for_chunks(chunk_count(N / kSmallRows, 4), N / kSmallRows,
             [&](int64_t, int64_t begin, int64_t end) { forward_rows(op, begin, end); });
  if (sample != nullptr) *sample = sum;
  return h;
}

}  // namespace

Tensor cpu::project_small(Tensor x, Tensor lora_A) {
  check_few_tokens(x, "x");
  check_project(x, lora_A);
  const int64_t tokens = x.size(0), R = lora_A.size(0), K = lora_A.size(1), h_size[] = {tokens, R};
  Tensor h = torch::stable::new_empty(x, {h_size, 2});
  const Operand operand(elements(x), tokens, K, nullptr);
  const Scratch<float> scaled_h(R * operand.token_width());
  project(operand, tokens, AdapterMatrix(lora_A), 1.0, static_cast<bf16*>(h.mutable_data_ptr()),
          scaled_h.data());
  return h;
}

Tensor cpu::lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                                  Tensor gain, std::optional<Tensor> bias, Tensor y,
                                  std::optional<Tensor> product) {
  check_few_tokens(x, "x");
  check_linear_fwd(x, weight, lora_A, lora_B, gain, bias, y, product);
  return forward(x, weight, lora_A, lora_B, scaling, static_cast<const float*>(gain.const_data_ptr()), bias,
                 y, product, nullptr, nullptr);
}

Tensor cpu::dora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                                  Tensor magnitude, std::optional<Tensor> bias, Tensor y,
                                  std::optional<Tensor> product, Tensor norm, std::optional<Tensor> kept_norm,
                                  std::optional<Tensor> kept_key, int64_t version) {
  check_few_tokens(x, "x");
  check_linear_fwd(x, weight, lora_A, lora_B, magnitude, bias, y, product, "magnitude");
  check_float_vector(norm, "norm", weight.size(0));
  STD_TORCH_CHECK(kept_norm.has_value() == kept_key.has_value(), "kept_norm and kept_key go together");
  const auto run = [&](bool norm_known, uint64_t* sample) {
    const DoraGain dora(magnitude, norm, norm_known);
    return forward(x, weight, lora_A, lora_B, scaling, dora.gain.data(), bias, y, product, &dora, sample);
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
