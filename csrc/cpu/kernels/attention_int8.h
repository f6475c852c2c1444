// Attention over an int8 cache: exact integer sums. A query becomes integers of up to 127 * 128 + 63 relative to its
// head's largest value, a chunk's weights (probability times the value's scale) integers of up to 65535 relative to the
// largest of their row, each as two planes of bytes; what is left of rounding is a hundredth of what bf16 costs.
#pragma once

#include "kernels/kv.h"

namespace ridgeline::RL_ISA {

inline constexpr int kMaxWeight = 65535;

// Register blocks: two planes of sums for every row and vector.
template <int R>
inline constexpr int kInt8Vectors = kTwoRegisters ? 1 : R <= 3 ? 4 : 2;

// scores[r][16 c ..] = q_r . k for C blocks of 16 keys, times the keys' scales and `scale`. `next`: the C blocks to
// fetch meanwhile, or null.
template <int R, int C, int kStride>
inline __attribute__((always_inline)) void int8_score_blocks(const uint8_t* const* q, const uint8_t* const* keys,
                                                             int dim, float scale, float* scores,
                                                             const uint8_t* const* next) {
  I32 high[R][C], low[R][C];
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) high[r][c] = low[r][c] = zero_i();
  if (next) {
RL_UNROLL
    for (int c = 0; c < C; c++) prefetch(next[c] + 16 * dim);  // the scales
  }
  for (int d = 0; d < dim; d += 4) {
    I32 k[C];
RL_UNROLL
    for (int c = 0; c < C; c++) {
      k[c] = load_i(keys[c] + 16 * d);
      if (next) prefetch(next[c] + 16 * d);
    }
RL_UNROLL
    for (int r = 0; r < R; r++) {
      const I32 h = splat_word(q[r] + d), l = splat_word(q[r] + dim + d);
RL_UNROLL
      for (int c = 0; c < C; c++) {
        high[r][c] = dot_u8s8(high[r][c], k[c], h);
        low[r][c] = dot_u8s8(low[r][c], k[c], l);
      }
    }
  }
RL_UNROLL
  for (int r = 0; r < R; r++) {
    const Int8Query& tail = *(const Int8Query*)(q[r] + 2 * dim);
    const F32 factor = splat(tail.scale * scale);
RL_UNROLL
    for (int c = 0; c < C; c++) {
      const I32 sum = sub_i(add_i(shift_left<7>(high[r][c]), low[r][c]), splat_i(tail.bias));
      store_f(scores + r * kStride + 16 * c, mul(to_f(sum), mul(factor, load_f(keys[c] + 16 * dim))));
    }
  }
}

// Scores of `blocks` blocks.
template <int R, int kStride>
inline void int8_scores(const uint8_t* const* q, const uint8_t* const* keys, int blocks, int dim, float scale,
                        float* scores, const uint8_t* const* next) {
  constexpr int C = kInt8Vectors<R>;
  int b = 0;
  for (; b + C <= blocks; b += C)
    int8_score_blocks<R, C, kStride>(q, keys + b, dim, scale, scores + 16 * b, next ? next + b : nullptr);
  for (; b < blocks; b++)
    int8_score_blocks<R, 1, kStride>(q, keys + b, dim, scale, scores + 16 * b, next ? next + b : nullptr);
}

// A row's probabilities of the keys below `limit`, weighted with the scales of their values, as planes of bytes:
// high at out, low at out + kChunk. Keys past the limit weigh 0. Returns the scale; NaN if a weight is.
inline float int8_weights(const float* p, const uint8_t* const* values, int blocks, int limit, int dim, uint8_t* out) {
  alignas(64) float weights[kChunk];
  for (int b = 0; b < blocks; b++) {
    const F32 w = mul(load_f(p + 16 * b), load_f(values[b] + 16 * dim));
    store_f(weights + 16 * b, keep_first(w, limit - 16 * b, zero_f()));
  }
  const float largest = magnitude(weights, 16 * blocks);
  const F32 inverse = inverse_scale((float)kMaxWeight, largest);
  for (int b = 0; b < blocks; b++) {
    const I32 w = to_i(mul(load_f(weights + 16 * b), inverse));
    store_low_bytes(out + 16 * b, shift_right<8>(w));
    store_low_bytes(out + kChunk + 16 * b, w);
  }
  return largest / (float)kMaxWeight;
}

// o[r][at ..] for C vectors of head dimensions. `next`: blocks to fetch meanwhile, or null.
template <int R, int C>
inline __attribute__((always_inline)) void int8_columns(const uint8_t* const* p, const float* scales,
                                                        const uint8_t* const* values, int blocks, int dim, int at,
                                                        float* o, const uint8_t* const* next) {
  I32 high[R][C], low[R][C];
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) high[r][c] = low[r][c] = zero_i();
  for (int t = 0; t < 16 * blocks; t += 4) {
    const size_t offset = (size_t)(t % 16) * dim + 4 * (size_t)at;
    const uint8_t* row = values[t / 16] + offset;
    I32 v[C];
RL_UNROLL
    for (int c = 0; c < C; c++) {
      v[c] = load_i(row + 64 * c);
      if (next) prefetch(next[t / 16] + offset + 64 * c);
    }
RL_UNROLL
    for (int r = 0; r < R; r++) {
      const I32 h = splat_word(p[r] + t), l = splat_word(p[r] + kChunk + t);
RL_UNROLL
      for (int c = 0; c < C; c++) {
        high[r][c] = dot_u8s8(high[r][c], h, v[c]);
        low[r][c] = dot_u8s8(low[r][c], l, v[c]);
      }
    }
  }
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) {
      const I32 sum = add_i(shift_left<8>(high[r][c]), low[r][c]);
      store_f(o + r * kMaxHeadDim + at + 16 * c, mul(to_f(sum), splat(scales[r])));
    }
}

template <int R>
inline void int8_output(const uint8_t* const* p, const float* scales, const uint8_t* const* values, int blocks,
                        int dim, float* o, const uint8_t* const* next) {
  constexpr int C = kInt8Vectors<R>;
  for (int b = 0; next && b < blocks; b++) prefetch(next[b] + 16 * dim);  // the scales
  int at = 0;
  for (; at + 16 * C <= dim; at += 16 * C) int8_columns<R, C>(p, scales, values, blocks, dim, at, o, next);
  for (; at < dim; at += 16) int8_columns<R, 1>(p, scales, values, blocks, dim, at, o, next);
}

}  // namespace ridgeline::RL_ISA
