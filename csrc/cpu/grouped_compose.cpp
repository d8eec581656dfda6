// out = gain[a] ⊙ v + bias with v[t] = base[t] + s[a] F[a] h[t], a being the adapter of row t; each element
// is read and rounded once. A row's result does not depend on where it stands.
#include "adapted_weight.h"
#include "compose_strip.h"
#include "grouped.h"
#include "lora_linear_common.h"
#include "ops.h"

namespace lora_fast {
namespace {

constexpr int64_t kTaskRows = 4 * kTileRows;
constexpr int64_t kTaskPanels = 8;
constexpr int64_t kPanelBytes = 1 << 18;  // of packed panels in a task, which a second-level cache holds

struct Compose {
  const void* base;  // [rows, width]
  void* out;         // the same, may be base
  void* product;     // the same, or null
  ScalarType dtype;
  int64_t width;
  const RowGroups* groups;
  const GroupedFactor* factor;
  Factor h;                 // [rows, R]
  const void* scaling;      // [adapters], of float or double as all is computed; null for 1
  const void *gain, *bias;  // [adapters, width] and [width], or null
  ScalarType gain_dtype, bias_dtype;
  bool wide;

  bool dealt() const { return is_dealt(dtype); }
  RankLayout layout(int64_t adapter) const {
    if (adapter < 0) return RankLayout(0, false, dealt());
    return RankLayout(factor->rank(adapter), use_pairs(h, factor->at(adapter), wide), dealt());
  }
};

// Columns [first, first + cols) of a vector at `offset`, as packed elements in the order of strips.
template <class F>
LORA_FAST_INLINE const F* pack_line(const void* vector, ScalarType dtype, int64_t offset, int64_t cols,
                                    bool dealt, F* out) {
  if (vector == nullptr) return nullptr;
  LORA_FAST_BY_DTYPE(dtype, In, convert_line(out, static_cast<const In*>(vector) + offset, 1, cols))
  std::fill(out + cols, out + round_up(cols, kStrip), F{});
  if (dealt) deal(out, round_up(cols, kStrip));
  return out;
}

// One thread's room.
struct Room {
  Room(const Compose& op, int64_t depth, int64_t panels)
      : lines(2 * panels * kTileCols * 8),
        h(kTaskRows * depth * (op.wide ? 8 : 4)),
        panels(panels * kTileCols * depth * (op.wide ? 8 : 4)) {}
  Scratch<char> lines, h, panels;
};

template <class F, class T>
LORA_FAST_INLINE void task_of(const Compose& op, const GroupTask& task, const Room& room) {
  const int64_t a = task.adapter, rows = task.end - task.begin, cols = task.last - task.first;
  const RankLayout layout = op.layout(a);
  const int64_t row_bytes = layout.depth * packed_size(layout, op.wide), panel_bytes = row_bytes * kTileCols;
  const int64_t* order = op.groups->order() + task.begin;
  F* lines = reinterpret_cast<F*>(room.lines.data());
  const F* gain =
      pack_line(a < 0 ? nullptr : op.gain, op.gain_dtype, a * op.width + task.first, cols, op.dealt(), lines);
  const F* bias =
      pack_line(op.bias, op.bias_dtype, task.first, cols, op.dealt(), lines + round_up(cols, kStrip));
  const bool adapted = layout.depth > 0;
  const Vec<F> scaling =
      splat(adapted && op.scaling != nullptr ? static_cast<const F*>(op.scaling)[a] : F{1});
  if (adapted) {
    for (int64_t i = 0; i < rows; ++i)
      pack_rows_into(room.h.data() + i * row_bytes, op.h, layout, op.wide, order[i], 1);
    std::memset(room.h.data() + rows * row_bytes, 0,
                static_cast<size_t>((round_up(rows, kTileRows) - rows) * row_bytes));
    for (int64_t j = 0; j < cols; j += kTileCols)
      pack_panel_into(room.panels.data() + j / kTileCols * panel_bytes, op.factor->at(a), layout, op.wide,
                      task.first + j, std::min(kTileCols, cols - j));
  }
  const AmxScope scope(layout.pairs, layout.step);
  alignas(64) F c[kTileRows * kTileCols];
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t tile_rows = std::min(kTileRows, rows - i);
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const int64_t tile_cols = std::min(kTileCols, cols - j);
      if (adapted)
        rank_tile(layout, room.h.data() + i * row_bytes, room.panels.data() + j / kTileCols * panel_bytes, c,
                  tile_rows, tile_cols);
      for (int64_t r = 0; r < tile_rows; ++r) {
        const int64_t at = order[i + r] * op.width + task.first + j;
        for (int64_t k = 0; k < tile_cols; k += kStrip) {
          compose_strip<F, T>(static_cast<const T*>(op.base) + at + k, static_cast<T*>(op.out) + at + k,
                              op.product != nullptr ? static_cast<T*>(op.product) + at + k : nullptr,
                              adapted ? c + r * kTileCols + k : nullptr, scaling,
                              gain != nullptr ? gain + j + k : nullptr,
                              bias != nullptr ? bias + j + k : nullptr, tile_cols - k);
        }
      }
    }
  }
}

template <class F>
LORA_FAST_CLONES void run_task(const Compose& op, const GroupTask& task, const Room& room) {
  LORA_FAST_BY_DTYPE(op.dtype, T, task_of<F, T>(op, task, room))
}

}  // namespace

void cpu::grouped_compose(Tensor base, Tensor h, std::vector<Tensor> factors, bool transposed,
                          std::optional<Tensor> scaling, std::optional<Tensor> gain,
                          std::optional<Tensor> bias, Tensor order, Tensor starts,
                          std::optional<Tensor> ranks, Tensor out, std::optional<Tensor> product) {
  check_matrix(base, "base");
  check_contiguous(base, "base");
  check_matrix(h, "h");
  const int64_t rows = base.size(0), width = base.size(1);
  check_size(h, "h", 0, rows);
  const RowGroups groups(order, starts, rows);
  const int64_t adapters = groups.adapters();
  const GroupedFactor factor(factors, transposed ? "lora_A" : "lora_B", ranks, transposed ? 0 : 1, adapters,
                             width);
  check_size(h, "h", 1, factor.largest_rank());
  const bool wide = is_double(base) || is_double(h) || factor.dtype() == ScalarType::Double;
  if (scaling) check_vector(*scaling, "scaling", adapters);
  if (gain) {
    check_matrix(*gain, "gain");
    check_size(*gain, "gain", 0, adapters);
    check_size(*gain, "gain", 1, width);
    check_contiguous(*gain, "gain");
  }
  if (bias) {
    check_vector(*bias, "bias", width);
    check_contiguous(*bias, "bias");
  }
  check_same(out, "out", base, "base");
  check_contiguous(out, "out");
  if (product) {
    check_same(*product, "product", base, "base");
    check_contiguous(*product, "product");
  }
  if (rows == 0) return;
  std::optional<PackedVector> scales;
  if (scaling) scales.emplace(*scaling, wide, false);
  const Compose op{base.const_data_ptr(),
                   out.mutable_data_ptr(),
                   product ? product->mutable_data_ptr() : nullptr,
                   base.scalar_type(),
                   width,
                   &groups,
                   &factor,
                   factor_of(h, 0),
                   scales ? scales->data() : nullptr,
                   gain ? gain->const_data_ptr() : nullptr,
                   bias ? bias->const_data_ptr() : nullptr,
                   gain ? gain->scalar_type() : ScalarType::Float,
                   bias ? bias->scalar_type() : ScalarType::Float,
                   wide};
  // rows of no adapter are in place already, unless they are to be elsewhere or something is added
  const bool copies = op.out != op.base || op.product != nullptr || op.bias != nullptr;
  int64_t work = 0, depth = 1;
  for (int64_t a = copies ? -1 : 0; a < adapters; ++a) {
    const int64_t count = groups.end(a) - groups.begin(a);
    if (count == 0) continue;
    depth = std::max(depth, op.layout(a).depth);
    work += (count + op.layout(a).rank) * width;
  }
  const int64_t threads = threads_for(work), blocks = round_up(width, kTileCols) / kTileCols;
  const int64_t fit = kPanelBytes / (kTileCols * depth * (wide ? 8 : 4));
  const int64_t panels = std::max<int64_t>(1, std::min({kTaskPanels, fit, blocks / threads}));
  GroupTasks tasks;
  for (int64_t a = copies ? -1 : 0; a < adapters; ++a)
    tasks.add(groups, a, kTaskRows, width, panels * kTileCols);
  tasks.run(threads, [&] {
    const Room room(op, depth, panels);
    GroupTask task;
    while (tasks.next(task)) (wide ? run_task<double> : run_task<float>)(op, task, room);
  });
}

}  // namespace lora_fast
