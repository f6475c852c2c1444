// One chunk of attention over an int8 cache on tile registers, for more rows than wait for memory. Products are exact
// integer sums and the rest is computed as in attention_int8.h, so the results have the same bits.
//
// A row is two planes of bytes, of its query and then of its weights, each a row of a tile. Keys are read where they
// lie, 16 of them by 64 dimensions to a tile. Of values a tile takes 64 tokens by 16 dimensions, from a copy that joins
// four blocks: what one block holds would fill a quarter.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "isa/isa.h"
#include "kernels/attention_int8.h"

namespace ridgeline::RL_ISA {

inline constexpr int kInt8TileRows = 16;
inline constexpr int kStepBlocks = 4;  // as many tokens as a tile of weights has bytes in a row
inline constexpr int kStepTokens = kStepBlocks * kBlock;
inline constexpr int kPartBlocks = 2;  // of keys multiplied at a time
inline constexpr int kPartDims = 32;   // of values

// What the rows of a chunk are computed in; small, for it shares the first-level cache with the keys and values.
struct Int8TileScratch {
  alignas(64) uint8_t queries[2][kInt8TileRows * kMaxHeadDim];  // planes: high, low
  alignas(64) int32_t sums[2][kInt8TileRows][32];               // of a part, by the planes
  // Scores, then probabilities times scales, then those as planes: in the place of 64 floats 64 high and 64 low bytes.
  alignas(64) float rows[kInt8TileRows][kChunk + 16];
  alignas(64) uint8_t values[kChunk * kMaxHeadDim];  // [tokens / 4][head_dim][4]
  alignas(64) float outputs[kInt8TileRows][kMaxHeadDim];
  F32 top[kInt8TileRows];
  float m[kInt8TileRows], l[kInt8TileRows], scales[kInt8TileRows];
};

// Tiles 0 and 2 sum high planes, 1 and 3 low ones, 4 and 5 hold them, 6 and 7 keys or values.
inline void configure_int8(int rows) {
  TileConfig c;
  for (int t = 0; t < 6; t++) c.shape(t, rows, 64);
  c.shape(6, 16, 64);
  c.shape(7, 16, 64);
  tile_configure(c);
}

template <int T>
inline void store_int8_sums(int32_t* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"((size_t)128), "i"(T) : "memory");
}

inline void store_part(Int8TileScratch& x) {
  store_int8_sums<0>(x.sums[0][0]), store_int8_sums<1>(x.sums[1][0]);
  store_int8_sums<2>(x.sums[0][0] + 16), store_int8_sums<3>(x.sums[1][0] + 16);
}

inline void zero_part() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

inline void load_queries(int d, int dim, const Int8TileScratch& x) {
  tile_load<4>(x.queries[0] + 64 * d, (size_t)dim), tile_load<5>(x.queries[1] + 64 * d, (size_t)dim);
}

// The sums of both planes by two blocks of keys; queries of 64 dimensions have been loaded.
inline void int8_tile_sums(const uint8_t* first, const uint8_t* second, int dim, Int8TileScratch& x) {
  zero_part();
  for (int d = 0; d < dim / 64; d++) {
    if (dim > 64) load_queries(d, dim, x);
    tile_load<6>(first + 1024 * d, 64);
    tile_dot_s8u8<0, 4, 6>(), tile_dot_s8u8<1, 5, 6>();
    tile_load<7>(second + 1024 * d, 64);
    tile_dot_s8u8<2, 4, 7>(), tile_dot_s8u8<3, 5, 7>();
  }
  store_part(x);
}

// Scores of two blocks of keys out of their sums, and the largest in each lane so far in x.top.
inline void int8_tile_scores(const uint8_t* const* q, int rows, const uint8_t* const* keys, const int* limits, int block,
                             int dim, float scale, Int8TileScratch& x) {
  const F32 key_scales[kPartBlocks] = {load_f(keys[0] + 16 * dim), load_f(keys[1] + 16 * dim)};
  for (int r = 0; r < rows; r++) {
    const Int8Query& tail = *(const Int8Query*)(q[r] + 2 * dim);
    const F32 factor = splat(tail.scale * scale);
    const I32 bias = splat_i(tail.bias);
    F32 top = x.top[r];
    for (int b = 0; b < kPartBlocks; b++) {
      const I32 high = load_i(x.sums[0][r] + kBlock * b), low = load_i(x.sums[1][r] + kBlock * b);
      const I32 sum = sub_i(add_i(shift_left<7>(high), low), bias);
      const F32 score = mul(to_f(sum), mul(factor, key_scales[b]));
      store_f(x.rows[r] + kBlock * (block + b), score);
      const int seen = limits[r] - kBlock * (block + b);
      top = max(top, seen >= kBlock ? score : keep_first(score, seen, top));
    }
    x.top[r] = top;
  }
}

// Four vectors of integers below 2^16, as 64 high and 64 low bytes.
inline void store_planes(const I32 (&w)[4], uint8_t* out) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint8_t, 64> order{};
    for (int i = 0; i < 32; i++) {  // packing alternates four of one vector and four of the other
      order[(size_t)i] = (uint8_t)(16 * (i % 16 / 4) + 8 * (i / 16) + 2 * (i % 4));
      order[(size_t)(i + 32)] = (uint8_t)(order[(size_t)i] + 1);
    }
    return order;
  }();
  const I32 order = load_i(kOrder.data());
  const I32 a = _mm512_permutexvar_epi8(order, _mm512_packus_epi32(w[0], w[1]));
  const I32 b = _mm512_permutexvar_epi8(order, _mm512_packus_epi32(w[2], w[3]));
  store_i(out, _mm512_shuffle_i64x2(a, b, 0xee));
  store_i(out + 64, _mm512_shuffle_i64x2(a, b, 0x44));
}

// A row's softmax and its weights: probabilities times the values' scales, as planes.
inline void int8_tile_weights(int r, int limit, const uint8_t* const* values, int steps, int dim, Int8TileScratch& x) {
  float* row = x.rows[r];
  const int full = limit / kBlock, rest = limit % kBlock, used = full + (rest > 0);
  const F32 base = splat(x.m[r] = reduce_max(x.top[r]));
  F32 sum = zero_f();
  I32 most = zero_i();
  auto weigh = [&](int b, F32 p, F32 w) {
    sum = add(sum, p);
    most = max_i(most, bits(w));  // none is negative
    store_f(row + kBlock * b, w);
  };
  for (int b = 0; b < full; b++) {
    const F32 p = exp2<true>(sub(load_f(row + kBlock * b), base));
    weigh(b, p, mul(p, load_f(values[b] + 16 * dim)));
  }
  if (rest) {
    const F32 p = keep_first(exp2<true>(sub(load_f(row + kBlock * full), base)), rest, zero_f());
    weigh(full, p, keep_first(mul(p, load_f(values[full] + 16 * dim)), rest, zero_f()));
  }
  for (int b = used; b < steps * kStepBlocks; b++) store_f(row + kBlock * b, zero_f());
  x.l[r] = reduce_add(sum);
  const float largest = std::bit_cast<float>(reduce_max_i(most));  // NaN if one is
  const F32 inverse = inverse_scale((float)kMaxWeight, largest);
  x.scales[r] = largest / (float)kMaxWeight;
  for (int s = 0; s < steps; s++) {
    I32 w[4];
    for (int i = 0; i < 4; i++) w[i] = to_i(mul(load_f(row + kStepTokens * s + kBlock * i), inverse));
    store_planes(w, (uint8_t*)row + 2 * kStepTokens * s);
  }
}

// Both planes' sums of weights by values, scaled.
inline void int8_tile_outputs(int rows, int steps, int dim, Int8TileScratch& x) {
  const size_t stride = 4 * (size_t)dim;
  for (int at = 0; at < dim; at += kPartDims) {
    zero_part();
    for (int s = 0; s < steps; s++) {
      const uint8_t *v = x.values + 16 * stride * (size_t)s + 4 * at, *w = (uint8_t*)x.rows[0] + 2 * kStepTokens * s;
      tile_load<4>(w, sizeof x.rows[0]), tile_load<5>(w + 64, sizeof x.rows[0]);
      tile_load<6>(v, stride);
      tile_dot_u8s8<0, 4, 6>(), tile_dot_u8s8<1, 5, 6>();
      tile_load<7>(v + 64, stride);
      tile_dot_u8s8<2, 4, 7>(), tile_dot_u8s8<3, 5, 7>();
    }
    store_part(x);
    for (int r = 0; r < rows; r++)
      for (int d = 0; d < kPartDims; d += 16) {
        const I32 sum = add_i(shift_left<8>(load_i(x.sums[0][r] + d)), load_i(x.sums[1][r] + d));
        store_f(x.outputs[r] + at + d, mul(to_f(sum), splat(x.scales[r])));
      }
  }
}

// The values of a chunk's blocks one after another, without their scales.
inline void copy_int8_values(const uint8_t* const* keys, size_t keys_bytes, int blocks, int dim, Int8TileScratch& x) {
  const size_t bytes = (size_t)kBlock * dim;
  for (int b = 0; b < blocks; b++)
    for (size_t i = 0; i < bytes; i += 64) store_i(x.values + b * bytes + i, load_i(keys[b] + keys_bytes + i));
}

// The partials of up to 16 rows over one chunk: x.m, x.l and the first rows of x.outputs. q: the rows' queries, each
// followed by its Int8Query; head_dim a multiple of 64. `copies`: how many blocks of values to copy, 0 if x.values holds
// what the rows see. `configured`: rows the tiles are shaped for.
inline void int8_tile_chunk(const uint8_t* const* q, int rows, const uint8_t* const* keys, const int* limits, int dim,
                            float scale, size_t keys_bytes, int copies, Int8TileScratch& x, int& configured) {
  if (configured != rows) configure_int8(configured = rows);
  const int seen = *std::max_element(limits, limits + rows), blocks = (seen + kBlock - 1) / kBlock;
  const int steps = (blocks + kStepBlocks - 1) / kStepBlocks;
  const uint8_t* values[kChunk / kBlock];
  for (int b = 0; b < blocks; b++) values[b] = keys[b] + keys_bytes;
  for (int r = 0; r < rows; r++) {
    for (int d = 0; d < dim; d += 64) {
      store_i(x.queries[0] + (size_t)r * dim + d, load_i(q[r] + d));
      store_i(x.queries[1] + (size_t)r * dim + d, load_i(q[r] + dim + d));
    }
    x.top[r] = splat(-std::numeric_limits<float>::infinity());
  }
  tile_fence();
  load_queries(0, dim, x);
  for (int b = 0; b < blocks; b += kPartBlocks) {
    const uint8_t* const part[kPartBlocks] = {keys[b], keys[std::min(b + 1, blocks - 1)]};
    int8_tile_sums(part[0], part[1], dim, x);
    int8_tile_scores(q, rows, part, limits, b, dim, scale, x);
  }
  for (int r = 0; r < rows; r++) int8_tile_weights(r, limits[r], values, steps, dim, x);
  copy_int8_values(keys, keys_bytes, copies, dim, x);
  tile_fence();
  int8_tile_outputs(rows, steps, dim, x);
}

}  // namespace ridgeline::RL_ISA
