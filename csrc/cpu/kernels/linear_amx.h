// Linear layers on tile registers: bf16 activations by Q8_0, Q4_0, Q4_1 (as T8 and T4) or bf16 weights, for any number
// of rows. A thread brings its rows into the order of tiles once, then takes one panel after another, unpacks it with
// its first rows and multiplies all its rows by it. Nobody takes over what another has left, as linear.cpp does.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cache_ahead.h"
#include "kernels/gemm_amx.h"
#include "kernels/quantize.h"

namespace ridgeline::RL_ISA {

inline constexpr size_t kFetchAhead = 16384;    // bytes further on that weights are fetched
inline constexpr size_t kRowsBytes = 1 << 20;   // of activations prepared at a time, half the second-level cache
inline constexpr size_t kSpareBytes = 224 << 10;  // of scratch, for what is kept of each row and rounding up
inline constexpr int kMostRows = 1024;

// One thread's part of a linear layer: its rows by units [unit_begin, unit_end).
template <Format kFormat>
class TileLinear {
 public:
  // `rows`: how many the thread will add in all.
  TileLinear(const LinearArgs& a, const Step& s, Worker& w, CacheAhead& cache, int rows, int unit_begin, int unit_end)
      : a_(a), s_(s), w_(w), cache_(cache), groups_(a.w.k / kGroup), tiles_(groups_ + 2 * minima_tiles(kFormat, groups_)),
        unit_begin_(unit_begin), unit_end_(unit_end), block_rows_(std::min(rows, kTileRows)) {
    const size_t budget = kScratchBytes - kSpareBytes, row = (size_t)tiles_ * kTileRow;
    const int wanted = (int)(kRowsBytes / row) / (2 * kTileRows) * (2 * kTileRows);
    capacity_ = std::clamp(wanted, budget / row < 2 * kTileRows ? kTileRows : 2 * kTileRows, kMostRows);
    uint8_t* at = w.scratch;
    auto take = [&](size_t bytes) { return std::exchange(at, at + round_up(bytes, 64)); };
    numbers_ = (int*)take(sizeof(int) * kMostRows);
    low_ = (float(*)[kTile])take(sizeof(float) * kTile * (size_t)capacity_);
    sums_ = (float(*)[4][256])take(sizeof(float) * 4 * 256 * (size_t)((capacity_ + 2 * kTileRows - 1) / (2 * kTileRows)));
    unpacked_ = take(kPartGroups * kGroupTiles);
    x_ = take(0);
  }

  void add_rows(int begin, int end) {
    for (int row = begin; row < end; row++) {
      if (pending_ == capacity_) flush();
      prepare(row);
      numbers_[pending_++] = row;
    }
  }

  // Multiplies the rows added.
  void flush() {
    if (!pending_) return;
    tile_configure(gemm_config(std::min(pending_, 2 * kTileRows)));
    for (int unit = unit_begin_; unit < unit_end_; unit++) multiply(unit);
    if (a_.next_layer < 0) tile_release();  // the step's last linears: until then the next wants them again
    pending_ = 0;
  }

 private:
  size_t x_tile() const { return (size_t)block_rows_ * kTileRow; }
  size_t x_block() const { return (size_t)tiles_ * x_tile(); }
  int panels() const { return a_.epilogue == Epilogue::None ? 1 : 2; }

  // The next row, times 2^96, in the order of tiles, and the sums of its groups. What is too large for that becomes
  // NaN, as does NaN; what is smaller than 2^-126 is 0, as for the tiles.
  void prepare(int row) {
    const uint8_t* from = s_.at(a_.x, (size_t)(a_.per_thread && s_.rows(a_.rows) == 1 ? w_.thread : row));
    uint8_t* to = x_ + (size_t)(pending_ / kTileRows) * x_block() + (size_t)(pending_ % kTileRows) * kTileRow;
    if constexpr (!is_tiled(kFormat)) {
      for (int g = 0; g < groups_; g++) store_i(to + (size_t)g * x_tile(), load_i(from + g * kTileRow));
      return;
    }
    alignas(64) short order[32];
RL_UNROLL
    for (int i = 0; i < 32; i++) order[i] = (short)tile_order(kFormat, i);
    const I32 places = load_i(order), magnitude = _mm512_set1_epi16(0x7fff), sign = _mm512_set1_epi16((short)0x8000);
    const I32 exponent = _mm512_set1_epi16(0x7f80), raise = _mm512_set1_epi16(kTileRaise << 7), ones = _mm512_set1_epi16(0x3f80);
    alignas(64) float sums[kMinimaGroups] = {};
    for (int g = 0; g < groups_; g++) {
      const I32 x = load_i(from + g * kTileRow);
      const __mmask32 some = _mm512_test_epi16_mask(x, exponent);
      const I32 raised = _mm512_maskz_adds_epi16(some, _mm512_and_si512(x, magnitude), raise);
      const I32 placed = _mm512_permutexvar_epi16(places, _mm512_ternarylogic_epi32(raised, x, sign, kOrAnd));
      store_i(to + (size_t)g * x_tile(), placed);
      if constexpr (kFormat == Format::T4) {
        sums[g % kMinimaGroups] = reduce_add(dot_bf16(zero_f(), placed, ones));
        if (g % kMinimaGroups == kMinimaGroups - 1 || g == groups_ - 1) {
          store_sums_of(sums, to + (size_t)(groups_ + g / kMinimaGroups * 2) * x_tile());
          std::fill_n(sums, kMinimaGroups, 0.0f);
        }
      }
    }
  }
  // 32 sums as bf16 and what that leaves, the row of two tiles.
  void store_sums_of(const float* sums, uint8_t* to) const {
    for (int i = 0; i < 2; i++) {
      const F32 x = load_f(sums + 16 * i);
      store_bf16(to + 32 * i, x);
      const F32 first = from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(to + 32 * i))), 16));
      store_bf16(to + x_tile() + 32 * i, sub(x, first));
    }
  }

  void multiply(int unit) {
    const int index = unit * panels();
    const bool pair = panels() == 2 && (unit + 1) * 2 * kPanel <= a_.w.n;
    for (int p = 0; p < (pair ? 2 : 1); p++) {
      const uint8_t* panel = a_.w.data + (size_t)(index + p) * a_.w.panel_bytes;
      multiply(panel, soon(index + p));
      const float* scales = (const float*)(panel + column_scales_at(kFormat, groups_));
      if (panels() == 1) {
        store_plain(unit, scales);
      } else if (pair && p == 0) {
        each_row(scales, [low = low_, dtype = a_.out_dtype](int i, uint8_t*, F32 a, F32 b) { store_f(low[i], gated(dtype, a, b)); });
      } else {
        store_gated(unit, pair, scales);
      }
    }
  }

  // body(a row's place among those pending, where its output begins, its sums of column tiles a and b, scaled), with all
  // that it wants in registers: what it stores could be anything to a compiler.
  template <class Body>
  void each_row(const float* scales, Body body) const {
    const F32 scale[2] = {load_f(scales), load_f(scales + kTile)};
    uint8_t* const out = s_.at(a_.out);
    const size_t stride = a_.out.stride;
    const int* const numbers = numbers_;
    for (int row = 0; row < pending_; row += kTileRows) {
      const float* sums = sums_[row / (2 * kTileRows)][row / kTileRows % 2 * 2];
      const int end = std::min(row + kTileRows, pending_);
      for (int i = row; i < end; i++, sums += kTile)
        body(i, out + (size_t)numbers[i] * stride, scaled(sums, scale[0]), scaled(sums + 256, scale[1]));
    }
  }

  // All rows by one panel, a part of K after another where there are more than 32.
  void multiply(const uint8_t* panel, const uint8_t* next) {
    const bool ring = pending_ <= 2 * kTileRows;
    const int parts = ring ? 1 : (groups_ + kPartGroups - 1) / kPartGroups;
    for (int part = 0; part < parts; part++) {
      const int begin = groups_ * part / parts, end = groups_ * (part + 1) / parts;
      for (int row = 0; row < pending_; row += 2 * kTileRows) {
        const uint8_t* x = x_ + (size_t)(row / kTileRows) * x_block();
        // Of the cache, in the first part.
        const Runs elsewhere = part == 0 ? cache_.take(end, parts * kTileLines) : Runs{};
        const TileProduct product{x,       x_tile(), x_block(), panel, unpacked_,        ring,  groups_,
                                  begin,   end,      next,      a_.w.panel_bytes, elsewhere, sums_[row / (2 * kTileRows)]};
        if (pending_ - row > kTileRows) {
          row == 0 ? tile_product<kFormat, 2, true>(product) : tile_product<kFormat, 2, false>(product);
        } else {
          row == 0 ? tile_product<kFormat, 1, true>(product) : tile_product<kFormat, 1, false>(product);
        }
      }
    }
  }

  // What to fetch while a panel is multiplied: this thread's panel a few further on, or the next layer's first ones.
  const uint8_t* soon(int panel) const {
    const int end = std::min(unit_end_ * panels(), (a_.w.n + kPanel - 1) / kPanel);
    panel += (int)((kFetchAhead + a_.w.panel_bytes - 1) / a_.w.panel_bytes);
    if (panel < end || !a_.next) return a_.w.data + (size_t)panel * a_.w.panel_bytes;
    const LinearArgs& next = *a_.next;
    const int columns = next.epilogue == Epilogue::None ? kPanel : 2 * kPanel, units = (next.w.n + columns - 1) / columns;
    const size_t begin = unit_begin_ ? (size_t)((long)units * w_.thread / w_.team.size()) * columns / kPanel : 0;
    return next.w.data + begin * next.w.panel_bytes + (size_t)(panel - end) * a_.w.panel_bytes;
  }
  static F32 scaled(const float* sums, F32 scale) {
    return is_tiled(kFormat) ? mul(load_f(sums), scale) : load_f(sums);
  }

  void store_plain(int unit, const float* scales) const {
    const int column = unit * kPanel, width = std::min(kPanel, a_.w.n - column);
    each_row(scales, [column, width](int, uint8_t* row, F32 a, F32 b) {
      float* out = (float*)row + column;
      if (width == kPanel) {
        store_f(out, a);
        store_f(out + kTile, b);
        return;
      }
      float both[kPanel];
      store_f(both, a);
      store_f(both + kTile, b);
      std::memcpy(out, both, 4 * (size_t)width);
    });
  }

  // `pair`: low_ holds what the unit's first panel gave.
  void store_gated(int unit, bool pair, const float* scales) const {
    each_row(scales, [unit, pair, low = low_, dtype = a_.out_dtype](int i, uint8_t* row, F32 a, F32 b) {
      const F32 y = gated(dtype, a, b);
      if (dtype == Dtype::Q8) {
        Q8Group* at = q8_group(row, unit);
        const F32 first = load_f(low[i]);
        store_q8<1>(&first, &y, &at);
      } else if (pair) {
        store_pair(dtype, row, 2 * unit, load_f(low[i]), y);
      } else if (dtype == Dtype::BF16) {
        store_bf16(row + 64 * (size_t)unit, y);
      } else {
        store_f(row + 128 * (size_t)unit, y);
      }
    });
  }

  const LinearArgs& a_;
  const Step& s_;
  const Worker& w_;
  CacheAhead& cache_;
  const int groups_, tiles_, unit_begin_, unit_end_, block_rows_;
  int capacity_, pending_ = 0;
  int* numbers_;         // of the rows pending
  float (*low_)[kTile];  // their results of a gated unit's first panel
  float (*sums_)[4][256];  // of 32 rows each by a panel
  uint8_t *unpacked_, *x_;
};

template <Format kFormat>
void tile_linear(const LinearArgs& a, const Step& s, Worker& w, CacheAhead& cache, int units) {
  const int rows = s.rows(a.rows), threads = w.team.size();
  if (w.team.has_blocks(rows)) {
    int own = 0;
    w.team.own(w.thread, rows, [&](int begin, int end) { own += end - begin; });
    TileLinear<kFormat> linear(a, s, w, cache, own, 0, units);
    w.team.own(w.thread, rows, [&](int begin, int end) { linear.add_rows(begin, end); });
    linear.flush();
    return;
  }
  const int begin = (int)((long)units * w.thread / threads), end = (int)((long)units * (w.thread + 1) / threads);
  TileLinear<kFormat> linear(a, s, w, cache, rows, begin, end);
  linear.add_rows(0, rows);
  linear.flush();
}

}  // namespace ridgeline::RL_ISA
