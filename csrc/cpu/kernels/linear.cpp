// Linear layers: shares units of output columns out among the threads and walks the rows in register
// blocks. K is never split, so the result of an element depends on neither threads nor other rows.
#include <algorithm>
#include <cstring>

#include "kernels/cache_ahead.h"
#include "kernels/gemm_float.h"
#include "kernels/gemm_q8.h"
#if defined(RL_ISA_AVX512)
#include "kernels/gemm_paired.h"
#endif
#include "kernels/quantize.h"
#include "kernels/table.h"

#if defined(RL_ISA_AMX)
#include "kernels/linear_amx.h"
#endif

namespace ridgeline::RL_ISA {
namespace {

// Rows of one register block. Six rows by a panel keep all accumulators in registers; for few rows, eight read the
// weights fewer times. Where a vector is two registers, it is four rows by half a panel.
constexpr int kMaxRows = kTwoRegisters ? 4 : 8;
constexpr int kManyRows = std::min(6, kMaxRows);
constexpr int kFewRows = 16;    // up to here reading the weights matters beside the arithmetic
constexpr int kStreamRows = 2;  // up to here nothing else does
constexpr int kFewBlocks = 4;   // register blocks that may fetch more with a group of K than others

// Starts to bring a panel into the cache. With 8-bit records a core asks for this many lines ahead of eight rows
// of arithmetic only when told so beforehand (docs/perf-log.md).
inline void fetch_panel(const uint8_t* panel, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) prefetch_lines<1>(panel + i, fetching.second_level);
}

// Columns of the output computed together: a panel's, or two panels' where gates leave half of them.
inline int columns_of(const LinearArgs& a) { return a.epilogue == Epilogue::None ? kPanel : 2 * kPanel; }
inline int units_of(const LinearArgs& a) { return (a.w.n + columns_of(a) - 1) / columns_of(a); }
inline const uint8_t* unit_at(const LinearArgs& a, int unit) {
  return a.w.data + (size_t)unit * (columns_of(a) / kPanel) * a.w.panel_bytes;
}

// What this thread's next products read, fetched while these compute: first its next unit of weights, then the cache.
class Ahead {
 public:
  Ahead(const LinearArgs& a, CacheAhead& cache) : cache_(cache), groups_(a.w.k / kGroup) {}

  // The rows' register blocks are `parts`, each of which fetches as much.
  void divide(int parts) { lines_ = parts > 1 && parts <= kFewBlocks ? fetching.few_lines : kLinesPerGroup; }
  void expect(const uint8_t* weights, size_t bytes) { at_ = weights, end_ = weights + bytes; }
  Runs take() {  // what one product fetches
    if (at_ >= end_) return cache_.take(groups_, lines_);
    at_ += piece();
    return {at_ - piece(), groups_, nullptr, 0, 0, groups_, lines_};
  }
  void hurry() {  // what one more product would leave of the weights is fetched at once
    for (; end_ - at_ > (long)piece(); at_ += 64) prefetch_lines<1>(at_, fetching.second_level);
  }

 private:
  size_t piece() const { return (size_t)groups_ * lines_ * 64; }

  CacheAhead& cache_;
  const int groups_;
  int lines_ = kLinesPerGroup;
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

// R rows by P panels, P being 1 for more than two rows. `stream`: panels that are not in the cache yet, so what lies
// further on is fetched as they are read. kPaired: panels taken apart for gemm_paired.h.
template <Format kFormat, bool kPaired, int R, int P>
inline __attribute__((always_inline)) void gemm(F32 (&out)[P][R][2], const PackedMatrix& w, const uint8_t* const (&panels)[P],
                                                const uint8_t* x, size_t stride, bool stream,
                                                [[maybe_unused]] Ahead& ahead) {
  if constexpr (!is_quantized(kFormat)) {
RL_UNROLL
    for (int p = 0; p < P; p++) gemm_float<kFormat, R>(out[p], w.k, panels[p], x, stride);
#if defined(RL_ISA_AVX512)
  } else if constexpr (kPaired) {
    gemm_paired<kFormat, R>(out[0], w.k, (const PairedGroup*)panels[0], x, stride, ahead.take());
#endif
  } else if constexpr (R <= kStreamRows) {
    stream_q8<kFormat, R, P>(out, w.k, panels, x, stride, stream ? fetching.stream_ahead : 0);
  } else {
    const bool whole = stream && kFormat == Format::Q8_0 && fetching.whole_panels;
    if (whole) fetch_panel(panels[0] + w.panel_bytes, w.panel_bytes);
    const size_t distance = stream && !whole ? fetching.ahead : 0;
    gemm_q8<kFormat, R>(out[0], w.k, panels[0], x, stride, distance, ahead.take());
  }
}

// A unit's panels, `bytes` each.
struct Panels {
  const uint8_t* at;
  size_t bytes;
};

// A thread's rectangle of a product.
struct Share {
  int unit_begin, unit_end, row_begin, row_end;
  Share(int units, int rows, const Team& team, int thread) {
    const int threads = team.size();
    int bands = std::clamp(rows / Team::kRowBlock, 1, threads);
    while (threads % bands) bands--;
    const int per_band = threads / bands, band = thread / per_band, place = thread % per_band;
    row_begin = (int)((long)rows * band / bands), row_end = (int)((long)rows * (band + 1) / bands);
    unit_begin = (int)((long)units * place / per_band), unit_end = (int)((long)units * (place + 1) / per_band);
  }
  int rows() const { return row_end - row_begin; }
};

// One register block: R rows from `row` by P units, `apart` from each other. A unit is a panel, or two panels with a
// gated epilogue, at `weights`. `stream`, kPaired: as above.
template <Format kFormat, bool kPaired, int R, int P>
__attribute__((noinline)) void block(const LinearArgs& a, const Step& s, const uint8_t* x, Panels weights, int unit,
                                     int apart, int row, bool stream, Ahead& ahead) {
  F32 acc[P][R][2];
  const uint8_t* panels[P];
  for (int p = 0; p < P; p++) panels[p] = weights.at + p * apart * (columns_of(a) / kPanel) * weights.bytes;
  if (R > kStreamRows && a.epilogue == Epilogue::None) {  // results go to a line or two of each row, far apart
    for (int r = 0; r < R; r++) {
      const float* out = (const float*)s.at(a.out, row + r) + unit * kPanel;
      prefetch_write(out), prefetch_write(out + kTile);
    }
  }
  gemm<kFormat, kPaired, R, P>(acc, a.w, panels, x, a.x.stride, stream, ahead);
  if (a.epilogue == Epilogue::None) {
    for (int p = 0; p < P; p++) {
      int column = (unit + p * apart) * kPanel, width = std::min(kPanel, a.w.n - column);
      for (int r = 0; r < R; r++) {
        float* out = (float*)s.at(a.out, row + r) + column;
        if (width == kPanel) {
          store_f(out, acc[p][r][0]);
          store_f(out + kTile, acc[p][r][1]);
        } else {
          float both[kPanel];
          store_f(both, acc[p][r][0]);
          store_f(both + kTile, acc[p][r][1]);
          std::memcpy(out, both, 4 * (size_t)width);
        }
      }
    }
    return;
  }
  // A panel is 16 columns of gate, then 16 of up: two of them give 32 columns of silu(gate) * up, one group.
  F32 low[P][R], high[P][R];
  auto gates = [&](F32 (&to)[P][R]) {
RL_UNROLL
    for (int p = 0; p < P; p++)
RL_UNROLL
      for (int r = 0; r < R; r++) to[p][r] = gated(a.out_dtype, acc[p][r][0], acc[p][r][1]);
  };
  gates(low);
  const bool pair = (unit + 1) * 2 * kPanel <= a.w.n;  // false at most for a last unit, which then is alone
  for (int p = 0; p < P; p++) panels[p] += weights.bytes;
  if (pair) gemm<kFormat, kPaired, R, P>(acc, a.w, panels, x, a.x.stride, stream, ahead);
  gates(high);
  for (int p = 0; p < P; p++) {
    const int at = unit + p * apart;
    if (a.out_dtype == Dtype::Q8) {
      Q8Group* groups[R];
      for (int r = 0; r < R; r++) groups[r] = q8_group(s.at(a.out, row + r), at);
      store_q8<R>(low[p], high[p], groups);
      continue;
    }
    for (int r = 0; r < R; r++) {
      uint8_t* out = s.at(a.out, row + r);
      if (pair) {
        store_pair(a.out_dtype, out, 2 * at, low[p][r], high[p][r]);
      } else if (a.out_dtype == Dtype::BF16) {
        store_bf16(out + 64 * (size_t)at, low[p][r]);
      } else {
        store_f(out + 128 * (size_t)at, low[p][r]);
      }
    }
  }
}

using Block = void (*)(const LinearArgs&, const Step&, const uint8_t*, Panels, int, int, int, bool, Ahead&);

// By rows, then one and two rows by two units.
template <Format kFormat>
constexpr Block kBlocks[kMaxRows + 1 + kStreamRows] = {
    nullptr,
    block<kFormat, false, 1, 1>, block<kFormat, false, 2, 1>, block<kFormat, false, 3, 1>, block<kFormat, false, 4, 1>,
#if !defined(RL_ISA_AVX2)
    block<kFormat, false, 5, 1>, block<kFormat, false, 6, 1>, block<kFormat, false, 7, 1>, block<kFormat, false, 8, 1>,
#endif
    block<kFormat, false, 1, 2>, block<kFormat, false, 2, 2>};

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

// From so many rows on, taking a unit apart is worth its while: at least four register blocks of five or six rows.
constexpr int kPairedRows = 20;
#if defined(RL_ISA_AVX512)
static_assert(kManyRows == 6);

template <Format kFormat>
constexpr Block kPairedBlocks[kManyRows + 1] = {
    nullptr, nullptr, nullptr, nullptr, nullptr, block<kFormat, true, 5, 1>, block<kFormat, true, 6, 1>};

template <Format kFormat>
Panels take_unit_apart(const LinearArgs& a, int unit, uint8_t* scratch, bool stream) {
  const int groups = a.w.k / kGroup;
  PairedGroup* to = (PairedGroup*)scratch;
  const int panels = std::min(columns_of(a), a.w.n - unit * columns_of(a) + kPanel - 1) / kPanel;
  for (int p = 0; p < panels; p++)
    take_apart<kFormat>(to + (size_t)p * groups, a.w.k, unit_at(a, unit) + p * a.w.panel_bytes, stream ? fetching.ahead : 0);
  return {scratch, groups * sizeof(PairedGroup)};
}
#endif

// Whether `rows` of the layer are multiplied by weights that have been taken apart.
bool is_paired([[maybe_unused]] const LinearArgs& a, [[maybe_unused]] int rows) {
#if defined(RL_ISA_AVX512)
  const size_t bytes = (size_t)(columns_of(a) / kPanel) * (a.w.k / kGroup) * sizeof(PairedGroup);
  return adds_beside_products && rows >= kPairedRows && can_pair(a.w.format) && bytes <= kScratchBytes;
#else
  return false;
#endif
}

// A unit's panels as such blocks read them, and those blocks.
Panels take_apart([[maybe_unused]] const LinearArgs& a, [[maybe_unused]] int unit, [[maybe_unused]] uint8_t* scratch,
                  [[maybe_unused]] bool stream, [[maybe_unused]] const Block*& blocks) {
#if defined(RL_ISA_AVX512)
  const bool minima = a.w.format == Format::Q4_1;
  blocks = minima ? kPairedBlocks<Format::Q4_1> : kPairedBlocks<Format::Q4_0>;
  return minima ? take_unit_apart<Format::Q4_1>(a, unit, scratch, stream)
                : take_unit_apart<Format::Q4_0>(a, unit, scratch, stream);
#else
  return {};
#endif
}

// Runs the layer on tile registers, where there are any and its weights and activations are made for them.
bool on_tiles([[maybe_unused]] const LinearArgs& a, [[maybe_unused]] const Step& s, [[maybe_unused]] Worker& w,
              [[maybe_unused]] CacheAhead& cache, [[maybe_unused]] int units) {
#if defined(RL_ISA_AMX)
  switch (a.w.format) {
    case Format::T4: return tile_linear<Format::T4>(a, s, w, cache, units), true;
    case Format::T8: return tile_linear<Format::T8>(a, s, w, cache, units), true;
    case Format::BF16: return a.w.k % kGroup == 0 && (tile_linear<Format::BF16>(a, s, w, cache, units), true);
    default: break;
  }
#endif
  return false;
}

}  // namespace

void linear(const LinearArgs& a, const Step& s, Worker& w) {
  const Block *blocks = blocks_of(a.w.format), *by_pairs = nullptr;
  const int rows = s.rows(a.rows), units = units_of(a);
  CacheAhead cache(a, s, w);
  if (rows == 0 || on_tiles(a, s, w, cache, units)) return;
  Ahead ahead(a, cache);
  auto panels_of = [&](int unit) { return Panels{unit_at(a, unit), a.w.panel_bytes}; };
  const int most = rows <= kFewRows ? kMaxRows : kManyRows;
  // Rows [row_begin, row_end) by a unit whose panels are `panels`, in register blocks of at most `most` rows.
  // `cold`: this thread has not read the unit yet. `next`: the one it reads next, to be fetched meanwhile, or null.
  auto run = [&](const Block* by, Panels panels, int unit, int row_begin, int row_end, bool cold, const uint8_t* next) {
    const int count = row_end - row_begin, parts = (count + most - 1) / most;
    const bool fetched = parts > 1 && next && is_quantized(a.w.format);
    ahead.divide(parts);
    if (fetched) ahead.expect(next, unit_at(a, 1) - unit_at(a, 0));
    for (int b = 0; b < parts; b++) {  // parts differ by at most one row
      int from = row_begin + count * b / parts, to = row_begin + count * (b + 1) / parts;
      const uint8_t* x = s.at(a.x, rows == 1 && a.per_thread ? w.thread : from);
      if (b == parts - 1) ahead.hurry();
      by[to - from](a, s, x, panels, unit, 0, from, cold && b == 0 && !fetched, ahead);
    }
  };
  if (w.team.has_blocks(rows)) {  // each thread's rows by all units
    w.team.balance(w.calls++, w.thread, [&](int) { return units; }, [&](int owner, int unit) {
      int widest = 0;  // of its blocks of rows; the last one may be short
      w.team.own(owner, rows, [&](int begin, int end) { widest = std::max(widest, end - begin); });
      const bool paired = is_paired(a, widest), mine = owner == w.thread, stream = !mine || unit == 0;
      bool cold = !paired;
      const Panels packed = panels_of(unit), apart = paired ? take_apart(a, unit, w.scratch, stream, by_pairs) : packed;
      const uint8_t* next = paired && mine && unit + 1 < units ? unit_at(a, unit + 1) : nullptr;
      w.team.own(owner, rows, [&](int begin, int end) {
        const bool pairs = paired && end - begin >= kPairedRows;
        run(pairs ? by_pairs : blocks, pairs ? apart : packed, unit, begin, end, cold, next);
        cold = false, next = nullptr;
      });
    });
    return;
  }
  // Else a rectangle each, so that its weights stay in its caches from step to step. An item of it is a unit, or two of
  // them half its whole units apart; a last one may be left over.
  const Share own(units, rows, w.team, w.thread);
  auto first_of = [&](const LinearArgs& b) {
    return unit_at(b, Share(units_of(b), s.rows(b.rows), w.team, w.thread).unit_begin);
  };
  const uint8_t* after = a.next ? first_of(*a.next) : nullptr;
  auto pairs_of = [&](const Share& share) {
    const bool two = fetching.two_streams && share.rows() <= kStreamRows && is_quantized(a.w.format);
    return two ? std::max(0, std::min(share.unit_end, a.w.n / columns_of(a)) - share.unit_begin) / 2 : 0;
  };
  auto items = [&](int owner) {
    const Share share(units, rows, w.team, owner);
    return share.unit_end - share.unit_begin - pairs_of(share);
  };
  w.team.balance(w.calls++, w.thread, items, [&](int owner, int i) {
    const bool mine = owner == w.thread;
    const Share share = mine ? own : Share(units, rows, w.team, owner);
    const int pairs = pairs_of(share);
    if (i < pairs) {
      const uint8_t* x = s.at(a.x, rows == 1 && a.per_thread ? w.thread : share.row_begin);
      const int unit = share.unit_begin + i;
      return blocks[kMaxRows + share.rows()](a, s, x, panels_of(unit), unit, pairs, share.row_begin, true, ahead);
    }
    const int unit = share.unit_begin + pairs + i;
    const bool paired = is_paired(a, share.rows());
    const bool stream = !mine || unit == share.unit_begin;  // which the operator before may not have fetched
    const Panels panels = paired ? take_apart(a, unit, w.scratch, stream, by_pairs) : panels_of(unit);
    const uint8_t* next = !mine ? nullptr : unit + 1 < share.unit_end ? unit_at(a, unit + 1) : after;
    run(paired ? by_pairs : blocks, panels, unit, share.row_begin, share.row_end, !paired, next);
  });
}

}  // namespace ridgeline::RL_ISA
