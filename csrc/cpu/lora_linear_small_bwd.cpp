// The backward of lora_linear for up to 32 tokens in bfloat16:
//   dv = gain ⊙ dy   dgain = Σ_t dy ⊙ v   dbias = Σ_t dy   dh = s dv B   dB = dvᵀ (s h)
//   dA = dhᵀ x   dx = dv W + dh A
// First over the columns of dy, then, with dh complete, over the columns of x and of W.
#include "lora_linear_common.h"
#include "ops.h"
#include "parallel.h"

namespace lora_fast {
namespace {

// A rank in whole vectors.
int64_t padded_rank(int64_t rank) {
  return round_up(rank, kLanes);
}

// out [rows][padded rank] = factor · m [rows, rank], zero-padded
LORA_FAST_CLONES void widen_rows(float* out, const bf16* m, int64_t rows, int64_t rank, float factor) {
  const int64_t width = padded_rank(rank);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < width; ++r)
      out[i * width + r] = r < rank ? factor * widen_one(m[i * rank + r]) : 0.0f;
  }
}

struct OutputSide {
  const bf16 *grad_y, *product;  // [tokens, N]; product may be null
  const float* gain;             // may be null
  const bf16* lora_B;            // [N, R]
  const float* h;                // s h, [tokens][padded R]
  int64_t tokens, N, R;
  bf16* grad_v;                  // [tokens padded to 16, N]
  void* grad_B;                  // [N, R], may be null
  bool wide_B;                   // whether grad_B is float32
  float *grad_gain, *grad_bias;  // may be null
};

// Strips [begin, end) of 32 outputs; grad_h [tokens][padded R] is this thread's part of dv B, null if
// unwanted.
LORA_FAST_CLONES void output_strips(const OutputSide& op, float* grad_h, float scaling, int64_t begin,
                                    int64_t end) {
  const int64_t width = padded_rank(op.R);
  alignas(64) float dv[kSmallTokens][kStrip];
  const Scratch<float> rows(kStrip * width);
  for (int64_t n = begin * kStrip; n < end * kStrip; n += kStrip) {
    Strip<float> dgain{}, dbias{}, gain{splat(1.0f), splat(1.0f)};
    if (op.gain != nullptr) {
      gain = load_packed(op.gain + n);
      deal_strip(gain.even, gain.odd);
    }
    for (int64_t t = 0; t < op.tokens; ++t) {
      const Strip<float> g = load_strip<float>(op.grad_y + t * op.N + n);
      if (op.product != nullptr) {
        const Strip<float> v = load_strip<float>(op.product + t * op.N + n);
        dgain = {dgain.even + g.even * v.even, dgain.odd + g.odd * v.odd};
      }
      dbias = {dbias.even + g.even, dbias.odd + g.odd};
      const Strip<float> scaled{g.even * gain.even, g.odd * gain.odd};
      store_packed<float>(&dv[t][0], scaled);
      store_strip<float>(op.grad_v + t * op.N + n, scaled);
    }
    alignas(64) float sums[2][kStrip];
    store_packed<float>(sums[0], dgain);
    store_packed<float>(sums[1], dbias);
    for (int64_t i = 0; i < kStrip; ++i) {
      if (op.grad_gain != nullptr) op.grad_gain[n + i] = sums[0][dealt_position(i)];
      if (op.grad_bias != nullptr) op.grad_bias[n + i] = sums[1][dealt_position(i)];
    }
    if (grad_h != nullptr) {
      widen_rows(rows.data(), op.lora_B + n * op.R, kStrip, op.R, scaling);
      for (int64_t r = 0; r < width; r += kLanes) {
        for (int64_t t = 0; t < op.tokens; ++t) {
          // four sums, so that an addition need not wait for the one before it
          Vec<float> part[4] = {load<float>(grad_h + t * width + r)};
          for (int64_t i = 0; i < kStrip; i += 4)
            for (int64_t u = 0; u < 4; ++u)
              part[u] += dv[t][dealt_position(i + u)] * load<float>(rows.data() + (i + u) * width + r);
          store<float>(grad_h + t * width + r, (part[0] + part[1]) + (part[2] + part[3]));
        }
      }
    }
    if (op.grad_B != nullptr) {
      for (int64_t i = 0; i < kStrip; ++i) {
        const int64_t at = dealt_position(i);
        for (int64_t r = 0; r < width; r += kLanes) {
          Vec<float> sum{};
          for (int64_t t = 0; t < op.tokens; ++t) sum += dv[t][at] * load<float>(op.h + t * width + r);
          const int64_t count = std::min(kLanes, op.R - r), to = (n + i) * op.R + r;
          if (op.wide_B) {
            std::memcpy(static_cast<float*>(op.grad_B) + to, &sum,
                        static_cast<size_t>(count) * sizeof(float));
          } else {
            bf16 rounded[kLanes];
            store<float>(rounded, sum);
            std::memcpy(static_cast<bf16*>(op.grad_B) + to, rounded,
                        static_cast<size_t>(count) * sizeof(bf16));
          }
        }
      }
    }
  }
}

struct InputSide {
  const bf16 *x, *lora_A;  // [tokens, K] or null, [R, K]
  const float* grad_h;     // s dv B, [tokens][padded R]
  int64_t tokens, tiles, K, R;
  const float* sums;  // dv W by strips, see small_backward; null if dx is unwanted
  bf16* grad_x;       // may be null
  void* grad_A;       // [R, K], may be null
  bool wide_A;        // whether grad_A is float32
};

// Strips [begin, end) of 32 inputs.
LORA_FAST_CLONES void input_strips(const InputSide& op, int64_t begin, int64_t end) {
  const int64_t width = padded_rank(op.R);
  alignas(64) float x[kSmallTokens][kStrip];
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t k = strip * kStrip;
    if (op.grad_A != nullptr) {
      for (int64_t t = 0; t < op.tokens; ++t)
        store_packed<float>(&x[t][0], load_strip<float>(op.x + t * op.K + k));
      for (int64_t r = 0; r < op.R; ++r) {
        Strip<float> sum{};
        for (int64_t t = 0; t < op.tokens; ++t) {
          const float dh = op.grad_h[t * width + r];
          const Strip<float> row = load_packed(&x[t][0]);
          sum = {sum.even + dh * row.even, sum.odd + dh * row.odd};
        }
        if (op.wide_A) {
          undeal_strip(sum.even, sum.odd);
          store_strip<float>(static_cast<float*>(op.grad_A) + r * op.K + k, sum);
        } else {
          store_strip<float>(static_cast<bf16*>(op.grad_A) + r * op.K + k, sum);
        }
      }
    }
    if (op.grad_x != nullptr) {
      for (int64_t t = 0; t < op.tokens; ++t)
        store_packed<float>(&x[t][0], load_packed(op.sums + (strip * op.tiles * kTokenTile + t) * kStrip));
      for (int64_t r = 0; r < op.R; ++r) {
        const Strip<float> a = load_strip<float>(op.lora_A + r * op.K + k);
        for (int64_t t = 0; t < op.tokens; ++t) {
          const float dh = op.grad_h[t * width + r];
          const Strip<float> row = load_packed(&x[t][0]);
          store_packed<float>(&x[t][0], {row.even + dh * a.even, row.odd + dh * a.odd});
        }
      }
      for (int64_t t = 0; t < op.tokens; ++t)
        store_strip<float>(op.grad_x + t * op.K + k, load_packed(&x[t][0]));
    }
  }
}

// sums [strips][tiles · 16][32] of the strips [begin, end) = g W, g [tiles · 16, N]
void weight_product(const bf16* g, const Tensor& weight, int64_t tiles, float* sums, int64_t begin,
                    int64_t end) {
  const int64_t N = weight.size(0), ld = weight.stride(0), size = tiles * kTokenTile * kStrip;
  std::memset(sums + begin * size, 0, static_cast<size_t>((end - begin) * size) * sizeof(float));
  const AmxScope scope(true, kSmallDepth);
  for (int64_t n = 0; n < N; n += kSmallRows) {
    small_backward(g + n, N, elements(weight) + n * ld + begin * kStrip, ld, end - begin, tiles,
                   sums + begin * size);
  }
}

LORA_FAST_CLONES void round_strips(const float* c, bf16* out, int64_t tokens, int64_t tiles, int64_t K,
                                   int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    const float* tile = c + strip * tiles * kTokenTile * kStrip;
    for (int64_t t = 0; t < tokens; ++t)
      store_strip<float>(out + t * K + strip * kStrip, load_packed(tile + t * kStrip));
  }
}

bf16* writable(Tensor& tensor, bool wanted) {
  return wanted ? static_cast<bf16*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace

Tensor cpu::input_grad_small(Tensor grad_v, Tensor weight) {
  check_few_tokens(grad_v, "grad_v");
  check_contiguous(grad_v, "grad_v");
  check_tiled_weight(weight);
  const int64_t tokens = grad_v.size(0), N = weight.size(0), K = weight.size(1);
  check_size(grad_v, "grad_v", 1, N);
  const int64_t tiles = round_up(tokens, kTokenTile) / kTokenTile, strips = K / kStrip;
  const PaddedRows rows(elements(grad_v), tokens, N, kTokenTile);
  const int64_t size[] = {tokens, K};
  Tensor grad_x = torch::stable::new_empty(grad_v, {size, 2});
  const Scratch<float> sums(strips * tiles * kTokenTile * kStrip);
  for_chunks(chunk_count(strips, 8), strips, [&](int64_t, int64_t begin, int64_t end) {
    weight_product(rows.data(), weight, tiles, sums.data(), begin, end);
    round_strips(sums.data(), writable(grad_x, true), tokens, tiles, K, begin, end);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu::lora_linear_small_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> product, std::optional<Tensor> h, bool need_x,
    bool need_A, bool need_B, bool need_gain, bool need_bias) {
  const Needs needs{need_x, need_A, need_B, need_gain, need_bias};
  check_few_tokens(grad_y, "grad_y");
  check_linear_bwd(grad_y, x, weight, lora_A, lora_B, gain, product, h, needs);
  const int64_t tokens = grad_y.size(0), N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  Gradients grad(grad_y, weight, lora_A, lora_B, needs);

  const int64_t width = padded_rank(R), tiles = round_up(tokens, kTokenTile) / kTokenTile;
  const Scratch<bf16> grad_v(tiles * kTokenTile * N);
  std::memset(grad_v.data() + tokens * N, 0,
              static_cast<size_t>((tiles * kTokenTile - tokens) * N) * sizeof(bf16));
  const RoundedMatrix rounded_A(AdapterMatrix{lora_A}), rounded_B(AdapterMatrix{lora_B});
  const Scratch<float> scaled_h(tokens * width);
  if (need_B) widen_rows(scaled_h.data(), elements(*h), tokens, R, static_cast<float>(scaling));
  const OutputSide outputs{elements(grad_y),
                           need_gain ? elements(*product) : nullptr,
                           gain ? static_cast<const float*>(gain->const_data_ptr()) : nullptr,
                           rounded_B.data(),
                           scaled_h.data(),
                           tokens,
                           N,
                           R,
                           grad_v.data(),
                           need_B ? grad.B.mutable_data_ptr() : nullptr,
                           lora_B.scalar_type() == ScalarType::Float,
                           need_gain ? static_cast<float*>(grad.gain.mutable_data_ptr()) : nullptr,
                           need_bias ? static_cast<float*>(grad.bias.mutable_data_ptr()) : nullptr};
  const bool need_h = need_x || need_A;
  const int64_t chunks = chunk_count(N / kStrip, 8);
  const Scratch<float> grad_h(chunks * tokens * width);  // one part per chunk
  std::memset(grad_h.data(), 0, static_cast<size_t>(chunks * tokens * width) * sizeof(float));
  for_chunks(chunks, N / kStrip, [&](int64_t chunk, int64_t begin, int64_t end) {
    output_strips(outputs, need_h ? grad_h.data() + chunk * tokens * width : nullptr,
                  static_cast<float>(scaling), begin, end);
  });
  if (!need_h) return {grad.x, grad.A, grad.B, grad.gain, grad.bias};
  for (int64_t i = tokens * width; i < chunks * tokens * width; ++i)
    grad_h.data()[i % (tokens * width)] += grad_h.data()[i];

  const int64_t strips = K / kStrip;
  const Scratch<float> sums(need_x ? strips * tiles * kTokenTile * kStrip : 0);
  const InputSide inputs{need_A ? elements(*x) : nullptr,
                         rounded_A.data(),
                         grad_h.data(),
                         tokens,
                         tiles,
                         K,
                         R,
                         sums.data(),
                         writable(grad.x, need_x),
                         need_A ? grad.A.mutable_data_ptr() : nullptr,
                         lora_A.scalar_type() == ScalarType::Float};
  for_chunks(chunk_count(strips, 8), strips, [&](int64_t, int64_t begin, int64_t end) {
    if (need_x) weight_product(grad_v.data(), weight, tiles, sums.data(), begin, end);
    input_strips(inputs, begin, end);
  });
  return {grad.x, grad.A, grad.B, grad.gain, grad.bias};
}

}  // namespace lora_fast
