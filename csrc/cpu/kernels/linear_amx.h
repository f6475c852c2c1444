// Linear layers with quantized weights on tile registers: a thread unpacks a panel once and multiplies all its rows
// by it, in blocks of up to 16. What is computed by whom is decided as in linear.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cache_ahead.h"
#include "kernels/gemm_amx.h"
#include "kernels/quantize.h"

namespace ridgeline::RL_ISA {

inline constexpr int kTileLeastRows = 64;  // fewer are as fast without tiles
inline constexpr size_t kBlockBytes = 512 << 10;  // of activations prepared at a time

using TileColumns = void (*)(const TileBlock&, const uint8_t*, const uint8_t*, int, float*, int, const Fetch&);

template <Format kFormat, size_t... kRows>
constexpr std::array<TileColumns, kTileRows> tile_columns_table(std::index_sequence<kRows...>) {
  return {tile_columns<kFormat, (int)kRows + 1>...};
}

// One thread's part of a linear layer: its rows by units [unit_begin, unit_end).
template <Format kFormat>
class TileLinear {
 public:
  TileLinear(const LinearArgs& a, const Step& s, Worker& w, CacheAhead& cache, int unit_begin, int unit_end)
      : a_(a), s_(s), cache_(cache), groups_(a.w.k / kGroup), unit_begin_(unit_begin), unit_end_(unit_end), rest_(w.scratch) {
    unpacked_ = take<uint8_t>((size_t)panels() * 2 * groups_ * kGroupBytes);
    block_ = take<TileBlock>((size_t)rows_at_once(a));
    results_ = take<float>((size_t)rows_at_once(a) * kResult);  // blocks of fewer than 16 rows only come last
    rows_at_ = rest_;
  }

  // Bytes of scratch that a layer needs for `rows` rows at a time.
  static size_t scratch_bytes(const LinearArgs& a, int rows) {
    const size_t groups = (size_t)a.w.k / kGroup, panels = a.epilogue == Epilogue::None ? 1 : 2;
    return panels * 2 * groups * kGroupBytes + 1024 +
           (sizeof(TileBlock) + 4 * kResult) * (size_t)rows_at_once(a) +
           ((size_t)rows / kTileRows + 1) * groups * kTileRows * 8;
  }

  // Rows that can be prepared at once: 16 at least, more while they fit the second-level cache.
  static int rows_at_once(const LinearArgs& a) {
    return std::max<int>(kTileRows, (int)(kBlockBytes / (size_t)a.w.k) / kTileRows * kTileRows);
  }

  // Takes rows [begin, end), at most rows_at_once together.
  void add_rows(int begin, int end) {
    for (int row = begin; row < end;) {
      if (pending_ == rows_at_once(a_)) flush();
      const int next = std::min(end, row + rows_at_once(a_) - pending_);
      prepare(row, next);
      pending_ += next - row;
      row = next;
    }
  }

  // Multiplies the rows taken.
  void flush() {
    for (int unit = unit_begin_; unit < unit_end_; unit++) multiply(unit);
    cold_ = false;
    rest_ = rows_at_;
    blocks_ = pending_ = 0;
  }

 private:
  static constexpr int kResult = 2 * kPanel;  // columns of a unit at most

  template <class T>
  T* take(size_t count) {
    T* at = (T*)rest_;
    rest_ += round_up(count * sizeof(T), 64);
    return at;
  }
  int panels() const { return a_.epilogue == Epilogue::None ? 1 : 2; }

  // Splits rows into blocks that differ by at most one row and lays out what their products read.
  void prepare(int begin, int end) {
    const int count = end - begin, parts = (count + kTileRows - 1) / kTileRows;
    for (int i = 0; i < parts; i++) {
      const int row = begin + (int)((long)count * i / parts), next = begin + (int)((long)count * (i + 1) / parts);
      float* scales = take<float>(16 * (size_t)groups_);
      float* scaled_sums = take<float>(16 * (size_t)groups_);
      for (int r = row; r < next; r++) {
        const uint8_t* x = s_.at(a_.x, (size_t)r);
        const float* from = (const float*)(x + q8_scales_at(a_.w.k));
        const float* sums = (const float*)(x + q8_scaled_sums_at(a_.w.k));
        for (int g = 0; g < groups_; g++) scales[16 * g + r - row] = from[g], scaled_sums[16 * g + r - row] = sums[g];
      }
      block_[blocks_++] = {s_.at(a_.x, (size_t)row), a_.x.stride, scales, scaled_sums, row, next - row};
    }
  }

  void multiply(int unit) {
    static constexpr auto kTable = tile_columns_table<kFormat>(std::make_index_sequence<kTileRows>{});
    const uint8_t* panel = a_.w.data + (size_t)unit * panels() * a_.w.panel_bytes;
    const bool pair = panels() == 2 && (unit + 1) * 2 * kPanel <= a_.w.n;
    const int used = pair ? 2 : 1;
    const size_t tile_bytes = (size_t)groups_ * kGroupBytes;
    for (int p = 0; p < used; p++)
      unpack_panel<kFormat>(panel + p * a_.w.panel_bytes, groups_, unpacked_ + 2 * p * tile_bytes);
    if constexpr (kFormat == Format::Q4_1) {
      for (int p = 0; p < used; p++)
        for (int i = 0; i < blocks_; i++)
          for (int row = 0; row < block_[i].rows; row += 8)
            minima_columns(block_[i], row, panel + p * a_.w.panel_bytes + code_bytes(kFormat) + 64, groups_,
                           record_bytes(kFormat), results(i) + row * kResult + kPanel * p, kResult);
    }
    for (int t = 0; t < 2 * used; t++) {  // one column tile stays in the first-level cache for all rows
      const uint8_t* scales = panel + t / 2 * a_.w.panel_bytes + code_bytes(kFormat) + t % 2 * 32;
      // The next unit's panels, half by either column tile: unpacking them is all loads and could not wait for memory.
      constexpr int kLines = (record_bytes(kFormat) / 64 + 1) / 2;
      const Fetch next{panel + (used + t / 2) * a_.w.panel_bytes + t % 2 * 64 * kLines, kLines, record_bytes(kFormat)};
      for (int i = 0; i < blocks_; i++) {
        const TileBlock& b = block_[i];
        if (b.rows != configured_) tile_configure(gemm_config(configured_ = b.rows));
        kTable[(size_t)b.rows - 1](b, unpacked_ + t * tile_bytes, scales, groups_, results(i) + kTile * t, kResult,
                                     cold_ && i == 0 ? next : ahead());
      }
    }
    for (int i = 0; i < blocks_; i++)
      panels() == 1 ? store_plain(block_[i], unit, results(i)) : store_gated(block_[i], unit, pair, results(i));
  }
  Fetch ahead() {
    const uint8_t* at = cache_.take();
    return at ? Fetch{at, kLinesPerGroup, 64 * kLinesPerGroup} : Fetch{};
  }
  float* results(int block) const { return results_ + (size_t)block * kTileRows * kResult; }

  void store_plain(const TileBlock& b, int unit, const float* results) const {
    const int column = unit * kPanel, width = std::min(kPanel, a_.w.n - column);
    for (int r = 0; r < b.rows; r++)
      std::memcpy((float*)s_.at(a_.out, (size_t)(b.row + r)) + column, results + r * kResult, 4 * (size_t)width);
  }

  // Columns 0 to 15 are gate, 16 to 31 up, and again.
  void store_gated(const TileBlock& b, int unit, bool pair, const float* results) const {
    int r = 0;
    if (a_.out_dtype == Dtype::Q8) {
      for (; r + 8 <= b.rows; r += 8) store_gated_q8<8>(b.row + r, results + r * kResult, unit);
      for (; r < b.rows; r++) store_gated_q8<1>(b.row + r, results + r * kResult, unit);
      return;
    }
    for (; r < b.rows; r++) {
      uint8_t* out = s_.at(a_.out, (size_t)(b.row + r));
      if (pair) {
        store_pair(a_.out_dtype, out, 2 * unit, gated(results + r * kResult), gated(results + r * kResult + 32));
      } else if (a_.out_dtype == Dtype::BF16) {
        store_bf16(out + 64 * (size_t)unit, gated(results + r * kResult));
      } else {
        store_f(out + 128 * (size_t)unit, gated(results + r * kResult));
      }
    }
  }
  template <int N>
  void store_gated_q8(int row, const float* results, int unit) const {
    F32 low[N], high[N];
    Q8Place at[N];
    for (int i = 0; i < N; i++) {
      low[i] = gated(results + i * kResult);
      high[i] = gated(results + i * kResult + 32);
      at[i] = q8_place(s_.at(a_.out, (size_t)(row + i)), a_.w.n / 2, unit);
    }
    store_q8<N>(low, high, at);
  }
  static F32 gated(const float* at) { return mul(silu(load_f(at)), load_f(at + 16)); }

  const LinearArgs& a_;
  const Step& s_;
  CacheAhead& cache_;
  const int groups_, unit_begin_, unit_end_;
  uint8_t* rest_;  // of the scratch memory
  uint8_t *unpacked_, *rows_at_;
  float* results_;  // [blocks][16 rows][columns of a unit]
  TileBlock* block_;
  int blocks_ = 0, pending_ = 0, configured_ = 0;
  bool cold_ = true;
};

// Runs this thread's part; false, having done nothing, where a layer is better off without tiles.
template <Format kFormat>
bool tile_linear(const LinearArgs& a, const Step& s, Worker& w, CacheAhead& cache, int units) {
  using Linear = TileLinear<kFormat>;
  const int rows = s.rows(a.rows), threads = w.team.size();
  if (rows < kTileLeastRows || Linear::scratch_bytes(a, std::min(rows, Linear::rows_at_once(a))) > kScratchBytes)
    return false;
  if (w.team.has_blocks(rows)) {
    Linear linear(a, s, w, cache, 0, units);
    w.team.own(w.thread, rows, [&](int begin, int end) { linear.add_rows(begin, end); });
    linear.flush();
  } else {
    const int begin = (int)((long)units * w.thread / threads), end = (int)((long)units * (w.thread + 1) / threads);
    Linear linear(a, s, w, cache, begin, end);
    linear.add_rows(0, rows);
    linear.flush();
  }
  tile_release();
  return true;
}

}  // namespace ridgeline::RL_ISA
