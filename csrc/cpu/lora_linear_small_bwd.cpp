// The backward of lora_linear for up to 32 tokens:
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
template <class T>
LORA_FAST_INLINE void widen_rows(float* out, const T* m, int64_t rows, int64_t rank, float factor) {
  const int64_t width = padded_rank(rank);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * width;
    convert_line(row, m + i * rank, 1, rank);
    for (int64_t r = 0; r < rank; ++r) row[r] *= factor;
    std::fill(row + rank, row + width, 0.0f);
  }
}

// The first `count` of v to element `at` of out, which is float32 if `wide` and else T
template <class T>
LORA_FAST_INLINE void store_lanes(void* out, bool wide, int64_t at, f32x16 v, int64_t count) {
  if (wide) {
    std::memcpy(static_cast<float*>(out) + at, &v, static_cast<size_t>(count) * sizeof(float));
  } else {
    T rounded[kLanes];
    store<float>(rounded, v);
    std::memcpy(static_cast<T*>(out) + at, rounded, static_cast<size_t>(count) * sizeof(T));
  }
}

// The error of a running sum grows with its length. Those over the rows of W are sums of stretches, of so
// many rows each.
constexpr int64_t kStretch = 256;

// sums += part, which becomes zero
LORA_FAST_CLONES void add_part(float* part, int64_t size, float* sums) {
  for (int64_t i = 0; i < size; i += kLanes) {
    store<float>(sums + i, load<float>(sums + i) + load<float>(part + i));
    store<float>(part + i, f32x16{});
  }
}

template <class T>
struct OutputSide {
  const T *grad_y, *product;  // [tokens, N]; product may be null
  const float* gain;          // may be null
  const void* lora_B;         // [N, R], float32 where wide_B
  const float* h;             // s h, [tokens][padded R]
  int64_t tokens, N, R;
  T* grad_v;                     // [tokens padded to 16, N]
  void* grad_B;                  // [N, R], may be null
  bool wide_B;                   // whether grad_B is float32
  float *grad_gain, *grad_bias;  // may be null
};

// Strips [begin, end) of 32 outputs; grad_h [tokens][padded R] is this thread's part of dv B, null if
// unwanted.
template <class T>
LORA_FAST_CLONES void output_strips(const OutputSide<T>& op, float* grad_h, float scaling, int64_t begin,
                                    int64_t end) {
  const auto place = [](int64_t i) { return kDealt<T> ? dealt_position(i) : i; };
  const int64_t width = padded_rank(op.R);
  alignas(64) float dv[kSmallTokens][kStrip];
  const Scratch<float> rows(kStrip * width), part_h(op.tokens * width);
  std::memset(part_h.data(), 0, static_cast<size_t>(op.tokens * width) * sizeof(float));
  for (int64_t n = begin * kStrip; n < end * kStrip; n += kStrip) {
    Strip<float> dgain{}, dbias{}, gain{splat(1.0f), splat(1.0f)};
    if (op.gain != nullptr) {
      gain = load_packed(op.gain + n);
      if (kDealt<T>) deal_strip(gain.even, gain.odd);
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
      if (op.grad_gain != nullptr) op.grad_gain[n + i] = sums[0][place(i)];
      if (op.grad_bias != nullptr) op.grad_bias[n + i] = sums[1][place(i)];
    }
    if (grad_h != nullptr) {
      if (op.wide_B) {
        widen_rows(rows.data(), static_cast<const float*>(op.lora_B) + n * op.R, kStrip, op.R, scaling);
      } else {
        widen_rows(rows.data(), static_cast<const T*>(op.lora_B) + n * op.R, kStrip, op.R, scaling);
      }
      for (int64_t r = 0; r < width; r += kLanes) {
        for (int64_t t = 0; t < op.tokens; ++t) {
          // four sums, so that an addition need not wait for the one before it
          Vec<float> part[4] = {load<float>(part_h.data() + t * width + r)};
          for (int64_t i = 0; i < kStrip; i += 4)
            for (int64_t u = 0; u < 4; ++u)
              part[u] += dv[t][place(i + u)] * load<float>(rows.data() + (i + u) * width + r);
          store<float>(part_h.data() + t * width + r, (part[0] + part[1]) + (part[2] + part[3]));
        }
      }
      if ((n + kStrip) % kStretch == 0 || n + kStrip == end * kStrip)
        add_part(part_h.data(), op.tokens * width, grad_h);
    }
    if (op.grad_B != nullptr) {
      for (int64_t i = 0; i < kStrip; ++i) {
        const int64_t at = place(i);
        for (int64_t r = 0; r < width; r += kLanes) {
          Vec<float> sum{};
          for (int64_t t = 0; t < op.tokens; ++t) sum += dv[t][at] * load<float>(op.h + t * width + r);
          store_lanes<T>(op.grad_B, op.wide_B, (n + i) * op.R + r, sum, std::min(kLanes, op.R - r));
        }
      }
    }
  }
}

template <class T>
struct InputSide {
  const T* x;           // [tokens, K] or null
  const void* lora_A;   // [R, K], float32 where wide_A
  const float* grad_h;  // s dv B, [tokens][padded R]
  int64_t tokens, rows, K, R;
  const float* sums;  // dv W by strips of `rows` rows, see few_tokens.h; null if dx is unwanted
  T* grad_x;          // may be null
  void* grad_A;       // [R, K], may be null
  bool wide_A;        // whether grad_A is float32
};

// A strip of a row of lora_A, in the order of T's strips.
template <class T>
LORA_FAST_INLINE Strip<float> load_factor(const void* factor, bool wide, int64_t at) {
  if (!wide) return load_strip<float>(static_cast<const T*>(factor) + at);
  Strip<float> strip = load_strip<float>(static_cast<const float*>(factor) + at);
  if constexpr (kDealt<T>) deal_strip(strip.even, strip.odd);
  return strip;
}

// Strips [begin, end) of 32 inputs.
template <class T>
LORA_FAST_CLONES void input_strips(const InputSide<T>& op, int64_t begin, int64_t end) {
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
          if constexpr (kDealt<T>) undeal_strip(sum.even, sum.odd);
          store_strip<float>(static_cast<float*>(op.grad_A) + r * op.K + k, sum);
        } else {
          store_strip<float>(static_cast<T*>(op.grad_A) + r * op.K + k, sum);
        }
      }
    }
    if (op.grad_x != nullptr) {
      for (int64_t t = 0; t < op.tokens; ++t)
        store_packed<float>(&x[t][0], load_packed(op.sums + (strip * op.rows + t) * kStrip));
      for (int64_t r = 0; r < op.R; ++r) {
        const Strip<float> a = load_factor<T>(op.lora_A, op.wide_A, r * op.K + k);
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

// The rows of dv W's sums: in AMX tiles they are whole ones.
template <class T>
int64_t sum_rows(int64_t tokens) {
  return products_of<T>() == Products::tiles ? round_up(tokens, kTokenTile) : tokens;
}

// sums [strips][sum_rows][32] of the strips [begin, end) += g W over the rows [first, last) of W; g [tokens
// in whole tiles, N]
template <class T>
void add_weight_product(const T* g, const Tensor& weight, int64_t tokens, float* sums, int64_t begin,
                        int64_t end, int64_t first, int64_t last) {
  const int64_t N = weight.size(0), ld = weight.stride(0), strips = end - begin;
  const bool in_tiles = products_of<T>() == Products::tiles;
  const AmxScope scope(in_tiles, kSmallDepth);
  for (int64_t n = first; n < last; n += kSmallRows) {
    const T* rows = data_of<T>(weight) + n * ld + begin * kStrip;
    if (!in_tiles) {
      dot_backward(g + n, N, rows, ld, strips, tokens, sums);
    } else if constexpr (std::is_same_v<T, bf16>) {
      tiles_backward(g + n, N, rows, ld, strips, round_up(tokens, kTokenTile) / kTokenTile, sums);
    }
  }
}

// The same over all rows, from zero. A rounding to 16 bits hides the error of a running sum.
template <class T>
void weight_product(const T* g, const Tensor& weight, int64_t tokens, float* sums, int64_t begin,
                    int64_t end) {
  const int64_t N = weight.size(0), size = (end - begin) * sum_rows<T>(tokens) * kStrip;
  sums += begin * sum_rows<T>(tokens) * kStrip;
  std::memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
  if constexpr (sizeof(T) == 2) {
    add_weight_product(g, weight, tokens, sums, begin, end, 0, N);
  } else {
    const Scratch<float> part(size);
    std::memset(part.data(), 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t n = 0; n < N; n += kStretch) {
      add_weight_product(g, weight, tokens, part.data(), begin, end, n, std::min(N, n + kStretch));
      add_part(part.data(), size, sums);
    }
  }
}

template <class T>
T* writable(Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

struct Call {
  const Tensor &grad_y, &weight, &lora_A, &lora_B;
  const std::optional<Tensor>&x, &gain, &product, &h;
  double scaling;
  Needs needs;
};

template <class T>
void backward(const Call& call, Gradients& grad) {
  const Needs& needs = call.needs;
  const int64_t tokens = call.grad_y.size(0), N = call.weight.size(0), K = call.weight.size(1);
  const int64_t R = call.lora_A.size(0), width = padded_rank(R), padded = round_up(tokens, kTokenTile);
  const auto scaling = static_cast<float>(call.scaling);
  const Scratch<T> grad_v(padded * N);
  std::memset(grad_v.data() + tokens * N, 0, static_cast<size_t>((padded - tokens) * N) * sizeof(T));
  const Scratch<float> scaled_h(tokens * width);
  if (needs.B) widen_rows(scaled_h.data(), data_of<T>(*call.h), tokens, R, scaling);
  const OutputSide<T> outputs{data_of<T>(call.grad_y),
                              needs.gain ? data_of<T>(*call.product) : nullptr,
                              call.gain ? data_of<float>(*call.gain) : nullptr,
                              call.lora_B.const_data_ptr(),
                              scaled_h.data(),
                              tokens,
                              N,
                              R,
                              grad_v.data(),
                              needs.B ? grad.B.mutable_data_ptr() : nullptr,
                              call.lora_B.scalar_type() == ScalarType::Float,
                              writable<float>(grad.gain, needs.gain),
                              writable<float>(grad.bias, needs.bias)};
  const bool need_h = needs.x || needs.A;
  const int64_t chunks = chunk_count(N / kStrip, 8);
  const Scratch<float> grad_h(chunks * tokens * width);  // one part per chunk
  std::memset(grad_h.data(), 0, static_cast<size_t>(chunks * tokens * width) * sizeof(float));
  for_chunks(chunks, N / kStrip, [&](int64_t chunk, int64_t begin, int64_t end) {
    output_strips(outputs, need_h ? grad_h.data() + chunk * tokens * width : nullptr, scaling, begin, end);
  });
  if (!need_h) return;
  for (int64_t i = tokens * width; i < chunks * tokens * width; ++i)
    grad_h.data()[i % (tokens * width)] += grad_h.data()[i];

  const int64_t strips = K / kStrip, rows = sum_rows<T>(tokens);
  const Scratch<float> sums(needs.x ? strips * rows * kStrip : 0);
  const InputSide<T> inputs{needs.A ? data_of<T>(*call.x) : nullptr,
                            call.lora_A.const_data_ptr(),
                            grad_h.data(),
                            tokens,
                            rows,
                            K,
                            R,
                            sums.data(),
                            writable<T>(grad.x, needs.x),
                            needs.A ? grad.A.mutable_data_ptr() : nullptr,
                            call.lora_A.scalar_type() == ScalarType::Float};
  // two strips at least, since memory is read in pairs of lines
  const int64_t grain = std::max<int64_t>(2, blocks_of_a_thread<T>(N));
  for_chunks(chunk_count(strips, grain), strips, [&](int64_t, int64_t begin, int64_t end) {
    if (needs.x) weight_product(grad_v.data(), call.weight, tokens, sums.data(), begin, end);
    input_strips(inputs, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu::lora_linear_small_bwd(
    Tensor grad_y, std::optional<Tensor> x, Tensor weight, Tensor lora_A, Tensor lora_B, double scaling,
    std::optional<Tensor> gain, std::optional<Tensor> product, std::optional<Tensor> h, bool need_x,
    bool need_A, bool need_B, bool need_gain, bool need_bias) {
  const Needs needs{need_x, need_A, need_B, need_gain, need_bias};
  check_few_tokens(grad_y, "grad_y");
  check_few_tokens_weight(weight);
  check_linear_bwd(grad_y, x, weight, lora_A, lora_B, gain, product, h, needs);
  Gradients grad(grad_y, weight, lora_A, lora_B, needs);
  const Call call{grad_y, weight, lora_A, lora_B, x, gain, product, h, scaling, needs};
  LORA_FAST_BY_SHORT_DTYPE(weight.scalar_type(), T, backward<T>(call, grad))
  return {grad.x, grad.A, grad.B, grad.gain, grad.bias};
}

}  // namespace lora_fast
