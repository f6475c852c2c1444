// Attention over the paged cache, after FlashAttention (Dao et al., 2022) with fixed chunks: every 256
// absolute key positions give an independent partial (maximum m, sum l, output o), and partials are
// merged in chunk order. Lanes are keys in QK^T and head dimensions in PV. A query row's arithmetic is
// therefore the same in prefill and decode, beside any other rows, and however chunks are shared out.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/attention_float.h"
#include "kernels/attention_int8.h"
#include "kernels/kv.h"
#include "kernels/quantize.h"
#include "kernels/table.h"
#if defined(RL_ISA_AMX)
#include "kernels/attention_amx.h"
#include "kernels/attention_int8_amx.h"
#endif

namespace ridgeline::RL_ISA {
namespace {

constexpr int kRows = 6;        // query rows of one register block
constexpr int kAheadRows = 6;   // up to here a chunk's data takes longer to arrive than to compute

struct Scratch {
  alignas(64) float scores[kRows][kChunk];
  alignas(64) uint8_t probabilities[kRows][kChunk * 4];
  alignas(64) float partial[kRows][kMaxHeadDim];
  float m[kRows], l[kRows];
  float tile_m[kMaxTileRows], tile_l[kMaxTileRows];
  alignas(64) float tile_o[kMaxTileRows * kMaxHeadDim];
  alignas(64) uint8_t queries[kMaxTileRows * kMaxHeadDim * 4];  // of a task that rotates its own, or uses tiles
#if defined(RL_ISA_AMX)
  TileScratch tiles;
  Int8TileScratch int8_tiles;
  int configured;  // rows that the tile registers are shaped for, 0: none
#endif
};
static_assert(sizeof(Scratch) <= kScratchBytes);

// The partial of R rows over one chunk, into scratch.m, scratch.l and scratch.partial. `next`: 16 blocks of keys
// wanted next, or null. If given, the values are fetched while the scores are computed, and those keys after that.
template <Dtype kType, int R>
__attribute__((noinline)) void chunk_partial(const uint8_t* const* q, const uint8_t* const* keys, const int* limits,
                                             int dim, float scale, size_t keys_bytes, const uint8_t* const* next, Scratch& x) {
  const uint8_t *values[kChunk / kBlock], *p[R];
  int seen = *std::max_element(limits, limits + R), blocks = (seen + 15) / 16;
  for (int b = 0; b < blocks; b++) values[b] = keys[b] + keys_bytes;
  if constexpr (kType == Dtype::Q8) {
    float scales[R];
    int8_scores<R, kChunk>(q, keys, blocks, dim, scale, x.scores[0], next ? values : nullptr);
    for (int r = 0; r < R; r++) {
      p[r] = x.probabilities[r];
      softmax_row<Dtype::Q8>(x.scores[r], limits[r], (uint8_t*)x.scores[r], x.m[r], x.l[r]);
      scales[r] = int8_weights(x.scores[r], values, blocks, limits[r], dim, x.probabilities[r]);
    }
    return int8_output<R>(p, scales, values, blocks, dim, x.partial[0], next);
  }
  const uint8_t* queries[R];
  for (int r = 0; r < R; r++) {
    queries[r] = q[r];
    if constexpr (kExpanded<kType>) {  // x.partial is free until the values are weighed
      expand_bf16(x.partial[r], (const uint16_t*)q[r], dim);
      queries[r] = (const uint8_t*)x.partial[r];
    }
  }
  constexpr int C = kVectors<R>;
  int b = 0;
  for (; b + C <= blocks; b += C)
    score_blocks<kType, R, C>(queries, keys + b, dim, splat(scale), x.scores[0] + 16 * b, next ? values + b : nullptr);
  const uint8_t* const* more = next ? values + b : nullptr;
  float* scores = x.scores[0] + 16 * b;
  if (C > 1 && blocks - b == 1) score_blocks<kType, R, 1>(queries, keys + b, dim, splat(scale), scores, more);
  if constexpr (C == 4) {
    if (blocks - b == 2) score_blocks<kType, R, 2>(queries, keys + b, dim, splat(scale), scores, more);
    if (blocks - b == 3) score_blocks<kType, R, 3>(queries, keys + b, dim, splat(scale), scores, more);
  }
  for (int r = 0; r < R; r++) {
    p[r] = x.probabilities[r];
    softmax_row<kType>(x.scores[r], limits[r], x.probabilities[r], x.m[r], x.l[r]);
  }
  int at = 0;
  for (; at + 16 * C <= dim; at += 16 * C) output_columns<kType, R, C>(p, values, limits, dim, at, x.partial[0], next);
  for (; at < dim; at += 16) output_columns<kType, R, 1>(p, values, limits, dim, at, x.partial[0], nullptr);
}

// (m, l, o) absorbs the partial of the next chunk; m is in units of ln 2.
void merge(float& m, float& l, float* o, float pm, float pl, const float* po, int dim) {
  float top = std::max(m, pm), factors[2];
  float lanes[16] = {m - top, pm - top};
  store_f(lanes, exp2<false>(load_f(lanes)));
  factors[0] = lanes[0];
  factors[1] = lanes[1];
  m = top;
  l = l * factors[0] + pl * factors[1];
  F32 f0 = splat(factors[0]), f1 = splat(factors[1]);
  for (int d = 0; d < dim; d += 16) store_f(o + d, fma(load_f(po + d), f1, mul(load_f(o + d), f0)));
}

using Partial = void (*)(const uint8_t* const*, const uint8_t* const*, const int*, int, float, size_t,
                         const uint8_t* const*, Scratch&);
template <Dtype kType>
constexpr Partial kPartials[kRows + 1] = {nullptr,
                                          chunk_partial<kType, 1>,
                                          chunk_partial<kType, 2>,
                                          chunk_partial<kType, 3>,
                                          chunk_partial<kType, 4>,
                                          chunk_partial<kType, 5>,
                                          chunk_partial<kType, 6>};

struct Task {
  const AttentionArgs& a;
  const Step& s;
  const AttentionTask& t;
  Scratch& x;
  int kv_head, group;  // group: query heads that share a KV head

  int rows() const { return (t.token_end - t.token_begin) * group; }
  int token(int row) const { return t.token_begin + row / group; }
  int head(int row) const { return kv_head * group + row % group; }

  const uint8_t* query(int row) const {
    const size_t at_head = (size_t)(s.one_each ? row : head(row)) * a.rope.head_dim * query_bytes(s.cache.dtype);
    return (s.one_each ? x.queries : s.at(a.rope.q, token(row))) + at_head;
  }

  // Results of rows [from, to), as x.tile_l and x.tile_o have them.
  void store(int from, int to) const {
    const int dim = a.rope.head_dim;
    if (a.out_dtype == Dtype::Q8 && dim == 2 * kGroup) {  // eight groups together cost little more than two
      for (; from + 4 <= to; from += 4) store_heads<4>(from);
      if (from + 3 == to) return store_heads<3>(from);
    }
    for (int row = from; row < to; row++) {
      alignas(64) float result[kMaxHeadDim];
      const F32 inverse = splat(1.0f / x.tile_l[row]);
      const float* o = x.tile_o + (size_t)row * dim;
      for (int i = 0; i < dim; i += 16) store_f(result + i, mul(load_f(o + i), inverse));
      store_columns(a.out_dtype, s.at(a.out, token(row)), result, head(row) * dim, dim);
    }
  }

  // N rows of two groups each.
  template <int N>
  void store_heads(int from) const {
    F32 low[2 * N], high[2 * N];
    Q8Group* at[2 * N];
RL_UNROLL
    for (int i = 0; i < 2 * N; i++) {
      const int row = from + i / 2;
      const float* o = x.tile_o + (size_t)row * 2 * kGroup + i % 2 * kGroup;
      const F32 inverse = splat(1.0f / x.tile_l[row]);
      low[i] = mul(load_f(o), inverse);
      high[i] = mul(load_f(o + 16), inverse);
      at[i] = q8_group(s.at(a.out, token(row)), 2 * head(row) + i % 2);
    }
    store_q8<2 * N>(low, high, at);
  }

  // The blocks of a chunk; the last one stands in for those past the end.
  void find_keys(int chunk, const uint8_t* (&keys)[kChunk / kBlock]) const {
    const int32_t* table = s.block_tables[t.request] + chunk * (kChunk / kBlock);
    int seen = std::min(kChunk, s.positions[t.token_end - 1] + 1 - chunk * kChunk), blocks = (seen + 15) / 16;
    for (int b = 0; b < kChunk / kBlock; b++)
      keys[b] = keys_at(s.cache, table[std::min(b, blocks - 1)], a.rope.layer, kv_head);
  }

  void run_chunk(int chunk, const Task* after) const {
    int dim = a.rope.head_dim;
    const uint8_t *keys[kChunk / kBlock], *coming[kChunk / kBlock], *const* next = nullptr;
    find_keys(chunk, keys);
    if (rows() <= kAheadRows) {  // many rows compute for longer than a chunk takes to arrive
      if (chunk + 1 < t.chunk_end) {
        find_keys(chunk + 1, coming);
        next = coming;
      } else if (after) {
        after->find_keys(after->t.chunk_begin, coming);
        next = coming;
      }
    }
    if (on_tiles()) return run_tiles(chunk, keys, next);
    if (on_int8_tiles()) return run_int8_tiles(chunk, keys);
    const Partial* partials = s.cache.dtype == Dtype::BF16  ? kPartials<Dtype::BF16>
                              : s.cache.dtype == Dtype::F16 ? kPartials<Dtype::F16>
                              : s.cache.dtype == Dtype::Q8  ? kPartials<Dtype::Q8>
                                                            : kPartials<Dtype::F32>;
    for (int row = 0; row < rows(); row += kRows) {
      int count = 0, at[kRows], limits[kRows];
      const uint8_t* q[kRows];
      for (int r = row; r < std::min(row + kRows, rows()); r++) {
        int limit = std::min(kChunk, s.positions[token(r)] + 1 - chunk * kChunk);
        if (limit <= 0) continue;
        at[count] = r;
        limits[count] = limit;
        q[count++] = query(r);
      }
      if (count == 0) continue;
      partials[count](q, keys, limits, dim, a.scale * 1.44269504f, s.cache.keys_bytes, next, x);
      for (int i = 0; i < count; i++) absorb(at[i], chunk, x.m[i], x.l[i], x.partial[i]);
    }
  }

#if defined(RL_ISA_AMX)
  bool on_tiles() const { return s.cache.dtype == Dtype::BF16 && a.rope.head_dim % 32 == 0; }

  void run_tiles(int chunk, const uint8_t* const* keys, const uint8_t* const* next) const {
    const int dim = a.rope.head_dim;
    for (int row = 0; row < rows(); row += kAttentionTileRows) {
      int limits[kAttentionTileRows], first = row;
      const int end = std::min(row + kAttentionTileRows, rows());
      while (first < end && s.positions[token(first)] < chunk * kChunk) first++;  // rows of tokens before the chunk
      for (int r = first; r < end; r++) limits[r - first] = std::min(kChunk, s.positions[token(r)] + 1 - chunk * kChunk);
      if (first == end) continue;
      TileScratch& t = x.tiles;
      tile_chunk(x.queries + 2 * (size_t)first * dim, end - first, keys, limits, dim, a.scale * 1.44269504f,
                 s.cache.keys_bytes, next, t, x.configured);
      for (int r = first; r < end; r++) absorb(r, chunk, t.m[r - first], t.l[r - first], t.outputs[r - first]);
    }
  }

  // Fewer rows wait for memory, and then registers do as well.
  bool on_int8_tiles() const {
    return s.cache.dtype == Dtype::Q8 && a.rope.head_dim % 64 == 0 && rows() > kAheadRows;
  }

  void run_int8_tiles(int chunk, const uint8_t* const* keys) const {
    Int8TileScratch& tiles = x.int8_tiles;
    const int seen = std::min(kChunk, s.positions[t.token_end - 1] + 1 - chunk * kChunk);
    int copies = (seen + kBlock - 1) / kBlock;
    for (int row = 0; row < rows(); row += kInt8TileRows) {
      int limits[kInt8TileRows], first = row;
      const uint8_t* q[kInt8TileRows];
      const int end = std::min(row + kInt8TileRows, rows());
      while (first < end && s.positions[token(first)] < chunk * kChunk) first++;
      for (int r = first; r < end; r++) {
        limits[r - first] = std::min(kChunk, s.positions[token(r)] + 1 - chunk * kChunk);
        q[r - first] = query(r);
      }
      if (first == end) continue;
      int8_tile_chunk(q, end - first, keys, limits, a.rope.head_dim, a.scale * 1.44269504f, s.cache.keys_bytes, copies,
                      tiles, x.configured);
      copies = 0;
      for (int r = first, i = 0; r < end; r++, i++) absorb(r, chunk, tiles.m[i], tiles.l[i], tiles.outputs[i]);
    }
  }

  // The rows' queries one after another, as a tile takes them.
  void gather_queries() const {
    const size_t bytes = 2 * (size_t)a.rope.head_dim;
    for (int r = 0; r < rows(); r++)
      std::memcpy(x.queries + r * bytes, s.at(a.rope.q, token(r)) + head(r) * bytes, bytes);
  }
#else
  static bool on_tiles() { return false; }
  static bool on_int8_tiles() { return false; }
  void run_int8_tiles(int, const uint8_t* const*) const {}
  void run_tiles(int, const uint8_t* const*, const uint8_t* const*) const {}
  void gather_queries() const {}
#endif

  void absorb(int row, int chunk, float m, float l, const float* o) const {
    float* total = x.tile_o + (size_t)row * a.rope.head_dim;
    if (chunk == t.chunk_begin) {
      x.tile_m[row] = m;
      x.tile_l[row] = l;
      std::memcpy(total, o, 4 * (size_t)a.rope.head_dim);
    } else {
      merge(x.tile_m[row], x.tile_l[row], total, m, l, o, a.rope.head_dim);
    }
  }

  // A split task leaves its one chunk's partial; whoever finishes last merges all of them in order.
  void finish_split() const {
    int dim = a.rope.head_dim, stride = dim + 2;
    size_t index = (size_t)(t.split + t.chunk_begin) * a.rope.heads + (size_t)kv_head * group;
    for (int r = 0; r < group; r++) {
      float* p = s.partials + (index + r) * stride;
      p[0] = x.tile_m[r];
      p[1] = x.tile_l[r];
      std::memcpy(p + 2, x.tile_o + (size_t)r * dim, 4 * (size_t)dim);
    }
    std::atomic<int32_t>& arrived = s.partial_counts[(size_t)t.request * a.rope.kv_heads + kv_head];
    if (arrived.fetch_add(1, std::memory_order_acq_rel) != t.num_splits - 1) return;
    arrived.store(0, std::memory_order_relaxed);
    for (int r = 0; r < group; r++) {
      for (int c = 0; c < t.num_splits; c++) {
        size_t from = (size_t)(t.split + c) * a.rope.heads + (size_t)kv_head * group + r;
        const float* p = s.partials + from * stride;
        float* total = x.tile_o + (size_t)r * dim;
        if (c == 0) {
          x.tile_m[r] = p[0];
          x.tile_l[r] = p[1];
          std::memcpy(total, p + 2, 4 * (size_t)dim);
        } else {
          merge(x.tile_m[r], x.tile_l[r], total, p[0], p[1], p + 2, dim);
        }
      }
    }
    store(0, group);
  }

  // With one token to a request: what the rope_kv operator does otherwise, for this KV head.
  template <Dtype kType>
  void rotate_own() const {
    const size_t element = query_bytes(kType);
    for (int r = 0; r < group; r++)
      rope_query<kType>(a.rope, s, t.token_begin, head(r), x.queries + (size_t)r * a.rope.head_dim * element);
    const bool last = t.split < 0 || t.chunk_end == t.num_splits;  // the chunk that holds the token itself
    if (last) rope_key_value<kType>(a.rope, s, t.token_begin, kv_head);
  }

  // `after`: the task this thread does next, or null.
  void run(const Task* after) const {
    if (s.one_each) {
      if (s.cache.dtype == Dtype::BF16) rotate_own<Dtype::BF16>();
      if (s.cache.dtype == Dtype::F16) rotate_own<Dtype::F16>();
      if (s.cache.dtype == Dtype::F32) rotate_own<Dtype::F32>();
      if (s.cache.dtype == Dtype::Q8) rotate_own<Dtype::Q8>();
    }
    if (!s.one_each && on_tiles()) gather_queries();
    for (int chunk = t.chunk_begin; chunk < t.chunk_end; chunk++) run_chunk(chunk, after);
    if (t.split >= 0) return finish_split();
    store(0, rows());
  }
};

}  // namespace

void attention(const AttentionArgs& a, const Step& s, Worker& w) {
  Scratch& x = *(Scratch*)w.scratch;
  const int kv_heads = a.rope.kv_heads, count = (int)s.attention.size() * kv_heads;
  auto task = [&](int i) {
    return Task{a, s, s.attention[(size_t)(i / kv_heads)], x, i % kv_heads, a.rope.heads / kv_heads};
  };
  const uint32_t mark = s.first_claim + (uint32_t)a.rope.layer;
  auto run = [&](int i, int next) {
    if (s.attention_claims[i].exchange(mark, std::memory_order_relaxed) == mark) return;
    if (next == count) return task(i).run(nullptr);
    Task after = task(next);
    task(i).run(&after);
  };
  auto next_own = [&](int i) {
    while (i < count && w.team.owner(s.attention[(size_t)(i / kv_heads)].token_begin, s.tokens) != w.thread) i++;
    return i;
  };
#if defined(RL_ISA_AMX)
  x.configured = 0;
#endif
  // A thread's own tokens first, whose queries and cache it has at hand; then what others have left, from the end.
  for (int i = next_own(0), next; i < count; i = next) run(i, next = next_own(i + 1));
  for (int i = count - 1; i >= 0; i--)
    if (s.attention_claims[i].load(std::memory_order_relaxed) != mark) run(i, count);
#if defined(RL_ISA_AMX)
  if (x.configured) tile_release();
#endif
}

}  // namespace ridgeline::RL_ISA
