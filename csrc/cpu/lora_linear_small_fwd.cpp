// lora_linear for up to 32 tokens in bfloat16: one read of W, the rank step, gain and bias on the float32
// sums.
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// x [tiles · 16][depth] as [depth / 32][tiles][16 pairs][16 tokens] of pairs, blocks [begin, end) of 32
// columns
LORA_FAST_CLONES void pack_tokens(const bf16* x, int64_t depth, int64_t tiles, bf16* packed, int64_t begin,
                                  int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const bf16* rows = x + tile * kTokenTile * depth + block * kSmallDepth;
      bf16* out = packed + (block * tiles + tile) * kSmallDepth * kTokenTile;
      for (int half = 0; half < 2; ++half) {
        u32x16 words[8];
        transpose_words(rows + half * 16, depth * 2, words);
        for (int p = 0; p < 8; ++p) store_bits(out + (half * 8 + p) * 32, words[p]);
      }
    }
  }
}

struct Small {
  const bf16* weight;
  int64_t ld, N, K, R, tokens, tiles;
  const bf16* x;       // packed
  const float* h;      // s h, [R][tiles · 16]
  const bf16* lora_B;  // [N, R]
  const float *gain, *bias;
  bf16 *y, *product;
};

// turned [tokens][32] = c [32][tiles · 16] + s h lora_Bᵀ, the columns dealt (see Strip).
template <int64_t tiles>
LORA_FAST_INLINE void add_update(const Small& op, const float* c, int64_t n, float (*turned)[kStrip]) {
  constexpr int64_t width = tiles * kTokenTile;
  for (int64_t i = 0; i < kSmallRows; ++i) {
    const bf16* b = op.lora_B + (n + i) * op.R;
    f32x16 v[tiles];
    for (int64_t tile = 0; tile < tiles; ++tile) v[tile] = load<float>(c + i * width + tile * kTokenTile);
    for (int64_t r = 0; r < op.R; ++r)
      for (int64_t tile = 0; tile < tiles; ++tile)
        v[tile] += widen_one(b[r]) * load<float>(op.h + r * width + tile * kTokenTile);
    const int64_t column = dealt_position(i);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t t = 0; t < kTokenTile; ++t) turned[tile * kTokenTile + t][column] = v[tile][t];
  }
}

// The sums of 32 outputs, c [32][tiles · 16], to y and product [tokens, N].
LORA_FAST_CLONES void finish_rows(const Small& op, const float* c, int64_t n) {
  alignas(64) float turned[kSmallTokens][kStrip];
  op.tiles == 2 ? add_update<2>(op, c, n, turned) : add_update<1>(op, c, n, turned);
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
  alignas(64) float c[kSmallRows * kSmallTokens];
  const AmxScope scope(true, kSmallDepth);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block * kSmallRows;
    small_forward(op.weight + n * op.ld, op.ld, op.x, op.tiles, op.K, c);
    finish_rows(op, c, n);
  }
}

// h = x lora_Aᵀ as [tokens, R] in bfloat16, and s times it as [R][tiles · 16] in float32
void project(const bf16* lora_A, const Small& op, double scaling, bf16* h, float* scaled_h) {
  const PaddedRows rows(lora_A, op.R, op.K, kSmallRows);
  alignas(64) float c[kSmallRows * kSmallTokens];
  const AmxScope scope(true, kSmallDepth);
  const int64_t width = op.tiles * kTokenTile;
  for (int64_t r0 = 0; r0 < op.R; r0 += kSmallRows) {
    small_forward(rows.data() + r0 * op.K, op.K, op.x, op.tiles, op.K, c);
    for (int64_t r = r0; r < std::min(op.R, r0 + kSmallRows); ++r) {
      for (int64_t t = 0; t < width; ++t) {
        const bf16 rounded = narrow_one(c[(r - r0) * width + t]);
        if (t < op.tokens) h[t * op.R + r] = rounded;
        scaled_h[r * width + t] = static_cast<float>(scaling) * widen_one(rounded);
      }
    }
  }
}

}  // namespace

Tensor cpu::lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
                                  Tensor gain, std::optional<Tensor> bias, Tensor y,
                                  std::optional<Tensor> product) {
  check_tokens(x, "x");
  check_small_weight(weight);
  check_adapter(weight, lora_A, lora_B);
  check_adapter_dtype(lora_A, "lora_A");
  check_adapter_dtype(lora_B, "lora_B");
  const int64_t tokens = x.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  check_size(x, "x", 1, K);
  check_gain(gain, N);
  if (bias) {
    check_vector(*bias, "bias", N);
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous(),
                    "bias must be contiguous float32");
  }
  check_tokens(y, "y");
  check_size(y, "y", 0, tokens);
  check_size(y, "y", 1, N);
  if (product) {
    check_same(*product, "product", y, "y");
    check_contiguous(*product, "product");
  }
  const int64_t tiles = round_up(tokens, kTokenTile) / kTokenTile, blocks = K / kSmallDepth;
  const PaddedRows rows(elements(x), tokens, K, kTokenTile);
  const Scratch<bf16> packed(tiles * kTokenTile * K);
  for_chunks(chunk_count(blocks, 32), blocks, [&](int64_t, int64_t begin, int64_t end) {
    pack_tokens(rows.data(), K, tiles, packed.data(), begin, end);
  });
  const int64_t h_size[] = {tokens, R};
  Tensor h = torch::stable::new_empty(x, {h_size, 2});
  const Scratch<float> scaled_h(R * tiles * kTokenTile);
  const RoundedMatrix rounded_A(AdapterMatrix{lora_A}), rounded_B(AdapterMatrix{lora_B});
  const Small op{elements(weight),
                 weight.stride(0),
                 N,
                 K,
                 R,
                 tokens,
                 tiles,
                 packed.data(),
                 scaled_h.data(),
                 rounded_B.data(),
                 static_cast<const float*>(gain.const_data_ptr()),
                 bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                 static_cast<bf16*>(y.mutable_data_ptr()),
                 product ? static_cast<bf16*>(product->mutable_data_ptr()) : nullptr};
  project(rounded_A.data(), op, scaling, static_cast<bf16*>(h.mutable_data_ptr()), scaled_h.data());
  for_chunks(chunk_count(N / kSmallRows, 4), N / kSmallRows,
             [&](int64_t, int64_t begin, int64_t end) { forward_rows(op, begin, end); });
  return h;
}

}  // namespace lora_fast
