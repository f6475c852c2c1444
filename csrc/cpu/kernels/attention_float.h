// Attention of some query rows over a chunk of a cache in fp32, fp16 or bf16: scores, softmax, weighted values.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/fetch.h"
#include "kernels/kv.h"

namespace ridgeline::RL_ISA {

inline constexpr float kNone = -std::numeric_limits<float>::infinity();  // the maximum of no scores

// Vectors of a register block of R rows; where a vector is two registers, fewer.
template <int R>
inline constexpr int kVectors = !kTwoRegisters || R == 1 ? 4 : R <= 3 ? 2 : 1;
// Whether queries and probabilities beside a bf16 cache are multiplied as fp32 (the queries rounded to bf16 before).
template <Dtype kType>
inline constexpr bool kExpanded = kTwoRegisters && kType == Dtype::BF16;

inline void expand_bf16(float* out, const uint16_t* x, int n) {
  for (int i = 0; i < n; i++) out[i] = std::bit_cast<float>((uint32_t)x[i] << 16);
}

// scores[r][16 c ..] = q_r . k for C blocks of 16 keys; q rows are bf16 or fp32 as the cache is. `next`: the C blocks
// to fetch meanwhile, or null: a core overlaps few cache misses of its own while it computes, so they are fetched line
// by line, one for each vector computed, in the order a hardware prefetcher can follow.
template <Dtype kType, int R, int C>
inline __attribute__((always_inline)) void score_blocks(const uint8_t* const* q, const uint8_t* const* keys, int dim,
                                                        F32 scale, float* scores, const uint8_t* const* next) {
  F32 acc[R][C];
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) acc[r][c] = zero_f();
  constexpr int kLine = kType == Dtype::F16 ? 32 : 64;
  const bool second = fetching.second_level;
  const int steps = dim / Kv<kType>::kPair;
  int fetched_line = 0, fetched_block = 0;
  for (int d = 0; d < steps; d++) {
    if (next) {  // block after block, C of a block's lines a step
      prefetch_lines<C>(next[fetched_block] + (size_t)kLine * fetched_line, second);
      fetched_line += C;
      if (fetched_line >= steps) fetched_line -= steps, fetched_block++;
    }
    if constexpr (kExpanded<kType>) {
      I32 k[C];
RL_UNROLL
      for (int c = 0; c < C; c++) k[c] = load_i(keys[c] + 64 * d);
RL_UNROLL
      for (int i = 0; i < 2; i++)
RL_UNROLL
        for (int r = 0; r < R; r++) {
          const F32 x = splat(((const float*)q[r])[2 * d + i]);
RL_UNROLL
          for (int c = 0; c < C; c++) acc[r][c] = fma(i ? high_bf16(k[c]) : low_bf16(k[c]), x, acc[r][c]);
        }
    } else if constexpr (kType == Dtype::BF16) {
      I32 k[C];
RL_UNROLL
      for (int c = 0; c < C; c++) k[c] = load_i(keys[c] + 64 * d);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_word(q[r] + 4 * d);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = dot_bf16(acc[r][c], k[c], x);
      }
    } else {
      F32 k[C];
RL_UNROLL
      for (int c = 0; c < C; c++) k[c] = kType == Dtype::F16 ? load_f16(keys[c] + 32 * d) : load_f(keys[c] + 64 * d);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        F32 x = splat(((const float*)q[r])[d]);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = fma(k[c], x, acc[r][c]);
      }
    }
  }
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) store_f(scores + r * kChunk + 16 * c, mul(acc[r][c], scale));
}

// Softmax of a row over its first `limit` keys of the chunk, scores being in units of ln 2: probabilities relative
// to the row's maximum, in the type PV multiplies, and their sum as rounded. Keys past the limit get exactly 0.
template <Dtype kType>
inline void softmax_row(const float* scores, int limit, uint8_t* probabilities, float& m, float& l) {
  constexpr bool kBf16 = kType == Dtype::BF16 && !kExpanded<kType>, kShort = kType == Dtype::BF16 || kType == Dtype::Q8;
  const int full = limit / 16, rest = limit % 16;
  F32 top = rest ? keep_first(load_f(scores + 16 * full), rest, splat(kNone)) : splat(kNone);
  for (int b = 0; b < full; b++) top = max(top, load_f(scores + 16 * b));
  m = reduce_max(top);
  F32 base = splat(m), sum = zero_f();
  auto weight = [&](int b) { return exp2<kShort>(sub(load_f(scores + 16 * b), base)); };
  const F32 last = rest ? keep_first(weight(full), rest, zero_f()) : zero_f();
  if constexpr (kBf16) {
    auto put = [&](int b, F32 low, F32 high) {
      const I32 pair = pack_bf16(low, high);
      store_i(probabilities + 32 * b, pair);
      sum = dot_bf16(sum, pair, splat_i(0x3f803f80));  // times 1
    };
    int b = 0;
    for (; b + 2 <= full; b += 2) put(b, weight(b), weight(b + 1));
    if (b < full) put(b, weight(b), last);
    else if (rest) put(b, last, zero_f());
  } else {
    auto put = [&](int b, F32 p) {
      store_f(probabilities + 64 * b, p);
      sum = add(sum, p);
    };
    for (int b = 0; b < full; b++) put(b, weight(b));
    if (rest) put(full, last);
  }
  l = reduce_add(sum);
}

// acc[r][c] += p_r[t] * v[t][16 c ..] for tokens (pairs of tokens) [from, to) of the chunk. `next`: as above.
template <Dtype kType, int R, int C>
inline __attribute__((always_inline)) void weigh_values(F32 (&acc)[R][C], const uint8_t* const* p,
                                                        const uint8_t* const* values, int dim, int at, int from,
                                                        int to, const uint8_t* const* next = nullptr) {
  constexpr int kPerBlock = kBlock / Kv<kType>::kPair;
  constexpr int kElement = kType == Dtype::F16 ? 2 : 4;  // bytes of one lane in memory
  const bool second = fetching.second_level;
  for (int t = from; t < to; t++) {
    const size_t offset = (size_t)kElement * ((t % kPerBlock) * dim + at);
    const uint8_t* row = values[t / kPerBlock] + offset;
    if (next) prefetch_lines<C>(next[t / kPerBlock] + offset, second);
    if constexpr (kExpanded<kType>) {
      I32 v[C];
RL_UNROLL
      for (int c = 0; c < C; c++) v[c] = load_i(row + 64 * c);
RL_UNROLL
      for (int i = 0; i < 2; i++)
RL_UNROLL
        for (int r = 0; r < R; r++) {
          const F32 x = splat(((const float*)p[r])[2 * t + i]);
RL_UNROLL
          for (int c = 0; c < C; c++) acc[r][c] = fma(i ? high_bf16(v[c]) : low_bf16(v[c]), x, acc[r][c]);
        }
    } else if constexpr (kType == Dtype::BF16) {
      I32 v[C];
RL_UNROLL
      for (int c = 0; c < C; c++) v[c] = load_i(row + 64 * c);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_word(p[r] + 4 * t);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = dot_bf16(acc[r][c], v[c], x);
      }
    } else {
      F32 v[C];
RL_UNROLL
      for (int c = 0; c < C; c++) v[c] = kType == Dtype::F16 ? load_f16(row + 32 * c) : load_f(row + 64 * c);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        F32 x = splat(((const float*)p[r])[t]);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = fma(v[c], x, acc[r][c]);
      }
    }
  }
}

// The last token of a row whose limit is odd shares its bf16 pair with a token it must not see.
template <Dtype kType, int C>
inline void weigh_half_pair(F32 (&acc)[1][C], const uint8_t* p, const uint8_t* const* values, int dim, int at, int t) {
  const uint8_t* row = values[t / 8] + (size_t)4 * ((t % 8) * dim + at);
  if constexpr (kExpanded<kType>) {
    const F32 x = splat(((const float*)p)[2 * t]);
    for (int c = 0; c < C; c++) acc[0][c] = fma(low_bf16(load_i(row + 64 * c)), x, acc[0][c]);
    return;
  }
  I32 x = splat_word(p + 4 * t);
  for (int c = 0; c < C; c++) acc[0][c] = dot_bf16(acc[0][c], low_halves(load_i(row + 64 * c)), x);
}

// o[r][at ..] of R rows for C vectors of head dimensions. Tokens all rows see are taken together, the
// rest row by row: a masked value is never multiplied, not even by zero.
template <Dtype kType, int R, int C>
inline void output_columns(const uint8_t* const* p, const uint8_t* const* values, const int* limits, int dim, int at,
                           float* o, const uint8_t* const* next) {
  constexpr int kPair = Kv<kType>::kPair;
  F32 acc[R][C];
  int common = limits[0];
  for (int r = 0; r < R; r++) {
    common = std::min(common, limits[r]);
    for (int c = 0; c < C; c++) acc[r][c] = zero_f();
  }
  weigh_values<kType, R, C>(acc, p, values, dim, at, 0, common / kPair, next);
  for (int r = 0; r < R; r++) {
    F32 row[1][C];
    for (int c = 0; c < C; c++) row[0][c] = acc[r][c];
    weigh_values<kType, 1, C>(row, p + r, values, dim, at, common / kPair, limits[r] / kPair);
    if (kPair == 2 && limits[r] % 2) weigh_half_pair<kType, C>(row, p[r], values, dim, at, limits[r] / 2);
    for (int c = 0; c < C; c++) store_f(o + r * kMaxHeadDim + at + 16 * c, row[0][c]);
  }
}

}  // namespace ridgeline::RL_ISA
