// Linear layers: shares units of output columns out among the threads and walks the rows in register
// blocks. K is never split, so the result of an element depends on neither threads nor other rows.
#include <algorithm>
#include <cstring>

#include "kernels/gemm_float.h"
#include "kernels/gemm_q8.h"
#include "kernels/quantize.h"
#include "kernels/table.h"

namespace ridgeline::RL_ISA {
namespace {

constexpr int kMaxRows = 8;      // rows of one register block
constexpr int kStreamRows = 16;  // up to here the weights' bytes take longer than the arithmetic
constexpr size_t kFetchAhead = 16384;

// Brings a panel into the cache. A core overlaps many cache misses only while it has little else to do: eight
// rows of arithmetic between two 8-bit records leave memory idle (docs/perf-log.md).
inline void read_through(const uint8_t* panel, size_t bytes) {
  I32 sum = zero_i();
  for (size_t i = 0; i < bytes; i += 64) sum = add_i(sum, load_i(panel + i));
  keep(sum);
}

// R rows by one panel. `cold`: nobody has read the panel yet.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm(F32 (&out)[R][2], const PackedMatrix& w, const uint8_t* panel,
                                                const uint8_t* x, size_t stride, bool cold) {
  if constexpr (is_quantized(kFormat)) {
    const bool busy = cold && R > 2;
    if (kFormat == Format::Q8_0 && busy) read_through(panel, w.panel_bytes);
    gemm_q8<kFormat, R>(out, w.k, panel, (const int8_t*)x, stride, kFormat != Format::Q8_0 && busy ? kFetchAhead : 0);
  } else {
    gemm_float<kFormat, R>(out, w.k, panel, x, stride);
  }
}

// One register block: R rows from `row` by one panel, or by two with a gated epilogue.
template <Format kFormat, int R>
__attribute__((noinline)) void block(const LinearArgs& a, const Step& s, int unit, int row) {
  const bool cold = row == 0;
  const uint8_t* x = s.at(a.x, row);
  F32 acc[R][2];
  if (a.epilogue == Epilogue::None) {
    gemm<kFormat, R>(acc, a.w, a.w.data + (size_t)unit * a.w.panel_bytes, x, a.x.stride, cold);
    int column = unit * kPanel, width = std::min(kPanel, a.w.n - column);
    for (int r = 0; r < R; r++) {
      float* out = (float*)s.at(a.out, row + r) + column;
      if (width == kPanel) {
        store_f(out, acc[r][0]);
        store_f(out + kTile, acc[r][1]);
      } else {
        float both[kPanel];
        store_f(both, acc[r][0]);
        store_f(both + kTile, acc[r][1]);
        std::memcpy(out, both, 4 * (size_t)width);
      }
    }
    return;
  }
  // A panel is 16 columns of gate, then 16 of up: two of them give 32 columns of silu(gate) * up, one group.
  const uint8_t* panel = a.w.data + (size_t)unit * 2 * a.w.panel_bytes;
  F32 low[R];
  gemm<kFormat, R>(acc, a.w, panel, x, a.x.stride, cold);
  for (int r = 0; r < R; r++) low[r] = mul(silu(acc[r][0]), acc[r][1]);
  bool pair = (unit + 1) * 2 * kPanel <= a.w.n;
  if (pair) gemm<kFormat, R>(acc, a.w, panel + a.w.panel_bytes, x, a.x.stride, cold);
  for (int r = 0; r < R; r++) {
    uint8_t* out = s.at(a.out, row + r);
    if (pair) {
      store_pair(a.out_dtype, out, a.w.n / 2, 2 * unit, low[r], mul(silu(acc[r][0]), acc[r][1]));
    } else if (a.out_dtype == Dtype::BF16) {
      store_bf16(out + 64 * (size_t)unit, low[r]);
    } else {
      store_f(out + 128 * (size_t)unit, low[r]);
    }
  }
}

using Block = void (*)(const LinearArgs&, const Step&, int, int);

template <Format kFormat>
constexpr Block kBlocks[kMaxRows + 1] = {nullptr,           block<kFormat, 1>, block<kFormat, 2>,
                                         block<kFormat, 3>, block<kFormat, 4>, block<kFormat, 5>,
                                         block<kFormat, 6>, block<kFormat, 7>, block<kFormat, 8>};

const Block* blocks_of(Format f) {
  switch (f) {
    case Format::F32: return kBlocks<Format::F32>;
    case Format::F16: return kBlocks<Format::F16>;
    case Format::BF16: return kBlocks<Format::BF16>;
    case Format::Q8_0: return kBlocks<Format::Q8_0>;
    case Format::Q4_0: return kBlocks<Format::Q4_0>;
    default: return kBlocks<Format::Q4_1>;
  }
}

}  // namespace

void linear(const LinearArgs& a, const Step& s, Worker& w) {
  const Block* blocks = blocks_of(a.w.format);
  int rows = s.rows(a.rows);
  int columns = a.epilogue == Epilogue::None ? kPanel : 2 * kPanel;
  int units = (a.w.n + columns - 1) / columns;
  // Six rows by two tiles keep all accumulators in registers; up to 32 rows, eight read the weights
  // fewer times. Blocks differ by at most one row.
  int count = rows <= 32 ? (rows + 7) / 8 : (rows + 5) / 6;
  auto run = [&](int begin, int end) {
    for (int unit = begin; unit < end; unit++)
      for (int b = 0; b < count; b++) {
        int from = (int)((long)rows * b / count), to = (int)((long)rows * (b + 1) / count);
        blocks[to - from](a, s, unit, from);
      }
  };
  // Few rows stream the weights: each thread keeps to its own part of them. Many rows are arithmetic, which
  // is better shared out as threads become free.
  if (rows <= kStreamRows) {
    w.team.split(w.stage, w.thread, units, run);
  } else {
    w.team.share(w.stage, units, std::max(1, units / (8 * w.team.size())), run);
  }
}

}  // namespace ridgeline::RL_ISA
