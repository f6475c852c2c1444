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

constexpr int kMaxRows = 8;  // rows of one register block

template <Format kFormat, int R, int C>
inline __attribute__((always_inline)) void gemm(F32 (&out)[R][C], const PackedMatrix& w,
                                                const uint8_t* const (&tiles)[C], const uint8_t* x, size_t stride) {
  if constexpr (is_quantized(kFormat)) {
    gemm_q8<kFormat, R, C>(out, w, tiles, (const int8_t*)x, stride);
  } else {
    gemm_float<kFormat, R, C>(out, w, tiles, x, stride);
  }
}

// One register block: R rows from `row` by the tiles of `unit`.
template <Format kFormat, int R>
__attribute__((noinline)) void block(const LinearArgs& a, const Step& s, int unit, int row) {
  const uint8_t* x = s.at(a.x, row);
  const uint8_t* first = a.w.data + (size_t)unit * (a.epilogue == Epilogue::None ? 2 : 4) * a.w.tile_bytes;
  F32 acc[R][2];
  if (a.epilogue == Epilogue::None) {
    const uint8_t* tiles[2] = {first, first + a.w.tile_bytes};
    gemm<kFormat, R, 2>(acc, a.w, tiles, x, a.x.stride);
    int column = unit * 32, width = std::min(32, a.w.n - column);
    for (int r = 0; r < R; r++) {
      float* out = (float*)s.at(a.out, row + r) + column;
      if (width == 32) {
        store_f(out, acc[r][0]);
        store_f(out + 16, acc[r][1]);
      } else {
        float both[32];
        store_f(both, acc[r][0]);
        store_f(both + 16, acc[r][1]);
        std::memcpy(out, both, 4 * (size_t)width);
      }
    }
    return;
  }
  // Tiles alternate gate, up: two pairs give 32 columns of silu(gate) * up, one group to quantize.
  F32 low[R];
  const uint8_t* tiles[2] = {first, first + a.w.tile_bytes};
  gemm<kFormat, R, 2>(acc, a.w, tiles, x, a.x.stride);
  for (int r = 0; r < R; r++) low[r] = mul(silu(acc[r][0]), acc[r][1]);
  bool pair = (unit + 1) * 64 <= a.w.n;
  if (pair) {
    const uint8_t* next[2] = {first + 2 * a.w.tile_bytes, first + 3 * a.w.tile_bytes};
    gemm<kFormat, R, 2>(acc, a.w, next, x, a.x.stride);
  }
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
  int columns = a.epilogue == Epilogue::None ? 32 : 64;
  int units = (a.w.n + columns - 1) / columns;
  // Six rows by two tiles keep all accumulators in registers; up to 32 rows, eight read the weights
  // fewer times. Blocks differ by at most one row.
  int count = rows <= 32 ? (rows + 7) / 8 : (rows + 5) / 6;
  int chunk = std::max(1, units / (8 * w.team.size()));
  w.team.share(w.stage, units, chunk, [&](int begin, int end) {
    for (int unit = begin; unit < end; unit++)
      for (int b = 0; b < count; b++) {
        int from = (int)((long)rows * b / count), to = (int)((long)rows * (b + 1) / count);
        blocks[to - from](a, s, unit, from);
      }
  });
}

}  // namespace ridgeline::RL_ISA
