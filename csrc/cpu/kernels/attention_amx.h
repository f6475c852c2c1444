// One chunk of attention on tile registers, for a bf16 cache: blocks of keys and values lie as tiles take them.
//
// A row's result does not depend on the rows beside it: each element of a tile product is a sum over K in one fixed
// order, and a key that a row must not see weighs exactly 0, which adds nothing to a finite value. Values that may not
// be finite are dealt with: what lies past the last key any row sees is replaced by zeros, and rows that come out
// infinite or NaN beside rows that see more are computed again one by one.
#pragma once

#include <algorithm>
#include <cstring>

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

inline constexpr int kAttentionTileRows = 16;
inline constexpr int kChunkBlocks = kChunk / kBlock;

// What the rows of a chunk are computed in.
struct TileScratch {
  alignas(64) float scores[kAttentionTileRows][kChunk];
  alignas(64) uint16_t probabilities[kAttentionTileRows][kChunk];
  alignas(64) float outputs[kAttentionTileRows][kMaxHeadDim];
  alignas(64) uint8_t last_values[kBlock * kMaxHeadDim * 2];  // of a block that is not full
  float m[kAttentionTileRows], l[kAttentionTileRows];
};

// Tiles 0 to 3 sum, 4 holds queries, 5 keys, 6 probabilities, 7 values.
inline void configure_attention(int rows) {
  TileConfig c;
  for (int t = 0; t < 4; t++) c.shape(t, rows, 64);
  c.shape(4, rows, 64);
  c.shape(5, 16, 64);
  c.shape(6, rows, 32);
  c.shape(7, 8, 64);
  tile_configure(c);
}

template <int T>
inline void store_sums(float* rows, size_t stride_floats) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(4 * stride_floats), "i"(T) : "memory");
}

inline void fetch_block(const uint8_t* block, int dim) {
  for (int i = 0; i < 2 * kBlock * dim; i += 64) prefetch(block + i);
}

// scores[r][16 b ..] of `blocks` blocks of keys, unscaled; q: rows of `dim` bf16, one after another. Fetches the
// blocks' values meanwhile if `values` is not null.
inline void tile_scores(const uint8_t* q, const uint8_t* const* keys, int blocks, int dim, TileScratch& x,
                        const uint8_t* const* values) {
  for (int b = 0; b < blocks; b += 4) {
    const int some = std::min(4, blocks - b);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int d = 0; d < dim / 32; d++) {
      tile_load<4>(q + 64 * d, 2 * (size_t)dim);
      tile_load<5>(keys[b] + 1024 * d, 64);
      tile_dot_bf16<0, 4, 5>();
      if (some > 1) tile_load<5>(keys[b + 1] + 1024 * d, 64), tile_dot_bf16<1, 4, 5>();
      if (some > 2) tile_load<5>(keys[b + 2] + 1024 * d, 64), tile_dot_bf16<2, 4, 5>();
      if (some > 3) tile_load<5>(keys[b + 3] + 1024 * d, 64), tile_dot_bf16<3, 4, 5>();
    }
    for (int i = 0; values && i < some; i++) fetch_block(values[b + i], dim);
    store_sums<0>(x.scores[0] + 16 * b, kChunk);
    if (some > 1) store_sums<1>(x.scores[0] + 16 * b + 16, kChunk);
    if (some > 2) store_sums<2>(x.scores[0] + 16 * b + 32, kChunk);
    if (some > 3) store_sums<3>(x.scores[0] + 16 * b + 48, kChunk);
  }
}

// Softmax of a row over its first `limit` scores times `scale`, in units of ln 2: probabilities in bf16 relative to
// the largest, their sum as rounded; those from `limit` to the end of the blocks are exactly 0.
inline void tile_softmax(const float* scores, int limit, int blocks, F32 scale, uint16_t* probabilities, float& m,
                         float& l) {
  const F32 lowest = splat(-std::numeric_limits<float>::infinity());
  const int full = limit / 16, rest = limit % 16, used = full + (rest > 0);
  F32 top = rest ? keep_first(mul(load_f(scores + 16 * full), scale), rest, lowest) : lowest;
  for (int b = 0; b < full; b++) top = max(top, mul(load_f(scores + 16 * b), scale));
  m = reduce_max(top);
  const F32 base = splat(m);
  for (int b = 0; b < full; b++)
    store_bf16(probabilities + 16 * b, exp2<true>(sub(mul(load_f(scores + 16 * b), scale), base)));
  if (rest)
    store_bf16(probabilities + 16 * full,
               keep_first(exp2<true>(sub(mul(load_f(scores + 16 * full), scale), base)), rest, zero_f()));
  for (int b = used; b < blocks + blocks % 2; b++) store_bf16(probabilities + 16 * b, zero_f());
  F32 sum = zero_f();
  const I32 ones = splat_i(0x3f803f80);
  for (int b = 0; b < used; b += 2) sum = dot_bf16(sum, load_i(probabilities + 16 * b), ones);
  l = reduce_add(sum);
}

// outputs[r][at .. at + 16 * columns) for up to four tiles of 16 dimensions. Fetches `next`, blocks of keys, meanwhile
// if it is not null.
inline void tile_outputs(const uint8_t* const* values, int blocks, int dim, int at, int columns, TileScratch& x,
                         const uint8_t* const* next) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  const size_t stride = 4 * (size_t)dim;
  for (int b = 0; b < blocks; b++) {
    const uint8_t* v = values[b] + 4 * at;
    tile_load<6>(x.probabilities[0] + 16 * b, 2 * kChunk);
    tile_load<7>(v, stride);
    tile_dot_bf16<0, 6, 7>();
    if (columns > 1) tile_load<7>(v + 64, stride), tile_dot_bf16<1, 6, 7>();
    if (columns > 2) tile_load<7>(v + 128, stride), tile_dot_bf16<2, 6, 7>();
    if (columns > 3) tile_load<7>(v + 192, stride), tile_dot_bf16<3, 6, 7>();
    if (next) fetch_block(next[b], dim);
  }
  store_sums<0>(x.outputs[0] + at, kMaxHeadDim);
  if (columns > 1) store_sums<1>(x.outputs[0] + at + 16, kMaxHeadDim);
  if (columns > 2) store_sums<2>(x.outputs[0] + at + 32, kMaxHeadDim);
  if (columns > 3) store_sums<3>(x.outputs[0] + at + 48, kMaxHeadDim);
}

// A block's values with those from token `seen` on replaced by zeros.
inline void copy_seen_values(uint8_t* out, const uint8_t* block, int seen, int dim) {
  std::memset(out, 0, 2 * (size_t)kBlock * dim);
  std::memcpy(out, block, 4 * (size_t)(seen / 2) * dim);
  if (seen % 2 == 0) return;
  const size_t at = 4 * (size_t)(seen / 2) * dim;
  for (int d = 0; d < dim; d += 16) store_i(out + at + 4 * d, low_halves(load_i(block + at + 4 * d)));
}

inline bool all_outputs_finite(const TileScratch& x, int rows, int dim) {
  I32 worst = zero_i();
  for (int r = 0; r < rows; r++)
    for (int d = 0; d < dim; d += 16) worst = max_i(worst, bits(abs(load_f(x.outputs[r] + d))));
  return reduce_max(from_bits(worst)) <= std::numeric_limits<float>::max();
}

// The partials of up to 16 rows over one chunk into x.m, x.l and x.outputs. `configured`: rows the tiles are shaped
// for. `next`: 16 blocks of keys wanted after this, or null; if given, values and then those keys are fetched.
inline void tile_chunk(const uint8_t* q, int rows, const uint8_t* const* keys, const int* limits, int dim, float scale,
                       size_t keys_bytes, const uint8_t* const* next, TileScratch& x, int& configured) {
  if (configured != rows) configure_attention(configured = rows);
  const int seen = *std::max_element(limits, limits + rows), blocks = (seen + kBlock - 1) / kBlock;
  const uint8_t* values[kChunkBlocks];
  for (int b = 0; b < blocks; b++) values[b] = keys[b] + keys_bytes;
  tile_fence();
  tile_scores(q, keys, blocks, dim, x, next ? values : nullptr);
  for (int r = 0; r < rows; r++)
    tile_softmax(x.scores[r], limits[r], blocks, splat(scale), x.probabilities[r], x.m[r], x.l[r]);
  if (seen % kBlock) {
    copy_seen_values(x.last_values, values[blocks - 1], seen % kBlock, dim);
    values[blocks - 1] = x.last_values;
  }
  tile_fence();
  for (int at = 0; at < dim; at += 64)
    tile_outputs(values, blocks, dim, at, std::min(4, (dim - at) / 16), x, at ? nullptr : next);
  if (rows == 1 || *std::min_element(limits, limits + rows) == seen || all_outputs_finite(x, rows, dim)) return;
  for (int r = rows - 1; r >= 0; r--) {  // the result of a lone row is left in row 0
    tile_chunk(q + 2 * (size_t)r * dim, 1, keys, limits + r, dim, scale, keys_bytes, nullptr, x, configured);
    x.m[r] = x.m[0];
    x.l[r] = x.l[0];
    std::memcpy(x.outputs[r], x.outputs[0], 4 * (size_t)dim);
  }
}

}  // namespace ridgeline::RL_ISA
