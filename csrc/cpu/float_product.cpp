// x Wᵀ and x W in float32, in blocks of 256 outputs and up to 512 tokens: W is split into its parts on the
// way, a block at a time.
#include <atomic>
#include <cmath>

#include "amx_parts.h"
#include "ops.h"
#include "parallel.h"
#include "small_common.h"

namespace lora_fast {
namespace {

// The sums of 8 panels of outputs over 512 tokens, and the parts of both operands in 8 steps, stay in the
// second-level cache.
constexpr int64_t kBlockPanels = 8;
constexpr int64_t kBlockSteps = 8;
constexpr int64_t kTokenBlock = 512;
// Magnitudes between which no part, product or sum leaves the range of normal numbers to an extent that
// shows.
constexpr double kLargest = 0x1p126, kLargestSum = 0x1p120, kSmallestProduct = 0x1p-80;

enum class Outputs { rows, columns };  // of W: x Wᵀ or x W

struct Product {
  const float* x;  // [tokens, depth]
  int64_t depth;
  const float* weight;
  int64_t ld, outputs;
  Outputs are;
  float* out;  // [tokens, outputs]
};

// One block of tokens.
struct Tokens {
  int64_t first, count, panels;
  bf16* parts;  // of x, [panels][depth / 32]
};

// The largest magnitude that any thread met.
class Largest {
 public:
  void add(uint32_t bits) {
    uint32_t before = bits_;
    while (before < bits && !bits_.compare_exchange_weak(before, bits)) {
    }
  }
  double value() const {
    const uint32_t bits = bits_;
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    return static_cast<double>(magnitude);
  }

 private:
  std::atomic<uint32_t> bits_ = 0;
};

// Written so that NaN is not in range.
bool in_range(double x, double weight, int64_t depth) {
  if (!(x <= kLargest && weight <= kLargest)) return false;
  const double product = x * weight;
  return product == 0 || (product >= kSmallestProduct && product * static_cast<double>(depth) <= kLargestSum);
}

void split_tokens(const Product& op, const Tokens& tokens, Largest& largest, int64_t begin, int64_t end) {
  const int64_t steps = op.depth / kDepth;
  const auto split = op.are == Outputs::rows ? split_columns : split_rows;
  for (int64_t panel = begin; panel < end; ++panel)
    largest.add(split(op.x + (tokens.first + panel * kPanel) * op.depth, op.depth,
                      std::min(kPanel, tokens.count - panel * kPanel), steps,
                      tokens.parts + panel * steps * kPartsStep));
}

uint32_t split_weight(const Product& op, int64_t panel, int64_t step, int64_t steps, bf16* out) {
  if (op.are == Outputs::rows)
    return split_rows(op.weight + panel * kPanel * op.ld + step * kDepth, op.ld, kPanel, steps, out);
  return split_pairs(op.weight + step * kDepth * op.ld + panel * kPanel, op.ld, steps, out);
}

LORA_FAST_CLONES void add_block(const float* c, float* sums) {
  for (int64_t i = 0; i < kBlock; i += kLanes)
    store<float>(sums + i, load<float>(sums + i) + load<float>(c + i));
}

// One panel of tokens of `panels` blocks whose rows are outputs, to out [rows][ld]
LORA_FAST_CLONES void store_turned(const float* sums, int64_t rows, int64_t panels, float* out, int64_t ld) {
  for (int64_t t = 0; t < rows; t += 8) {
    for (int64_t half = 0; half < 2 * panels; ++half) {
      u32x16 words[8];
      transpose_words(sums + half * (kBlock / 2) + t / 16 * (kBlock / 4) + t % 16, 64, words);
      for (int64_t i = 0; i < std::min<int64_t>(8, rows - t); ++i)
        store_bits(out + (t + i) * ld + half * kLanes, words[i]);
    }
  }
}

// The same of blocks whose rows are tokens
LORA_FAST_CLONES void store_plain(const float* sums, int64_t rows, int64_t panels, float* out, int64_t ld) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t p = 0; p < panels; ++p) {
      const float* row = sums + p * kBlock + t / 16 * (kBlock / 2) + t % 16 * 16;
      store<float>(out + t * ld + p * kPanel, load<float>(row));
      store<float>(out + t * ld + p * kPanel + kLanes, load<float>(row + kBlock / 4));
    }
  }
}

// Panels [begin, end) of 32 outputs.
void product_panels(const Product& op, const Tokens& tokens, Largest& largest, int64_t begin, int64_t end) {
  const int64_t steps = op.depth / kDepth;
  const Scratch<bf16> weight(kBlockPanels * kBlockSteps * kPartsStep);
  const Scratch<float> sums(kBlockPanels * tokens.panels * kBlock);
  alignas(64) float c[kBlock];
  const AmxScope scope(true, kDepth);
  for (int64_t first = begin; first < end; first += kBlockPanels) {
    const int64_t panels = std::min(kBlockPanels, end - first);
    for (int64_t step = 0; step < steps; step += kBlockSteps) {
      const int64_t depth = std::min(kBlockSteps, steps - step);
      for (int64_t p = 0; p < panels; ++p)
        largest.add(split_weight(op, first + p, step, depth, weight.data() + p * depth * kPartsStep));
      for (int64_t t = 0; t < tokens.panels; ++t) {
        const bf16* x = tokens.parts + (t * steps + step) * kPartsStep;
        for (int64_t p = 0; p < panels; ++p) {
          const bf16* w = weight.data() + p * depth * kPartsStep;
          float* sum = sums.data() + (t * panels + p) * kBlock;
          // sums of stretches, so that the rounding errors of a long sum do not grow with its length
          float* to = step == 0 ? sum : c;
          op.are == Outputs::rows ? parts_product(w, x, depth, to) : parts_product(x, w, depth, to);
          if (step > 0) add_block(c, sum);
        }
      }
    }
    for (int64_t t = 0; t < tokens.panels; ++t) {
      const auto store = op.are == Outputs::rows ? store_turned : store_plain;
      store(sums.data() + t * panels * kBlock, std::min(kPanel, tokens.count - t * kPanel), panels,
            op.out + (tokens.first + t * kPanel) * op.outputs + first * kPanel, op.outputs);
    }
  }
}

void check_float32(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
}

}  // namespace

bool cpu::float_product(Tensor x, Tensor weight, bool transposed, Tensor out) {
  check_float32(x, "x");
  check_contiguous(x, "x");
  check_float32(weight, "weight");
  check_tiled_shape(weight);
  check_float32(out, "out");
  check_contiguous(out, "out");
  const int64_t tokens = x.size(0), outputs = weight.size(transposed ? 0 : 1);
  check_size(x, "x", 1, weight.size(transposed ? 1 : 0));
  check_size(out, "out", 0, tokens);
  check_size(out, "out", 1, outputs);
  const Product op{static_cast<const float*>(x.const_data_ptr()),
                   x.size(1),
                   static_cast<const float*>(weight.const_data_ptr()),
                   weight.stride(0),
                   outputs,
                   transposed ? Outputs::rows : Outputs::columns,
                   static_cast<float*>(out.mutable_data_ptr())};
  // the parts of x take at most 3/8 of the weight's memory
  const int64_t block = std::clamp(round_up(outputs / 4, kPanel), kPanel, kTokenBlock);
  const Scratch<bf16> parts(round_up(std::min(tokens, block), kPanel) * op.depth * kParts);
  Largest largest_x, largest_weight;
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t count = std::min(block, tokens - first), panels = round_up(count, kPanel) / kPanel;
    const Tokens here{first, count, panels, parts.data()};
    for_chunks(chunk_count(panels, 1), panels,
               [&](int64_t, int64_t begin, int64_t end) { split_tokens(op, here, largest_x, begin, end); });
    for_chunks(chunk_count(outputs / kPanel, 1), outputs / kPanel, [&](int64_t, int64_t begin, int64_t end) {
      product_panels(op, here, largest_weight, begin, end);
    });
    if (!in_range(largest_x.value(), largest_weight.value(), op.depth)) return false;
  }
  return true;
}

}  // namespace lora_fast
