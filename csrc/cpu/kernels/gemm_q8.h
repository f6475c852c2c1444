// The integer matrix product: int8 activations by 4- or 8-bit weights, R rows by a panel of 32 columns.
//
// One output element is accumulated over groups of K in ascending order, whatever R:
//   exact integer sum over 32 products, one conversion, one fused multiply-add by scale_w * scale_a
//   and, for formats with a minimum, one more of minimum * (scale_a * sum a).
// So a row's result does not depend on the rows computed beside it.
#pragma once

#include "isa/isa.h"
#include "kernels/fetch.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

template <Format kFormat>
inline constexpr int kZeroPoint = kFormat == Format::Q4_0 ? 8 : kFormat == Format::Q8_0 ? 128 : 0;

// Vectors of a panel's two that are computed together: as many as leave the sums of several rows in registers.
inline constexpr int kWidth = kTwoRegisters ? 1 : 2;

// acc[r] += a group's 32 products; rows[r] is the group of a row.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void dot_group(I32 (&acc)[R][kWidth], const uint8_t* codes,
                                                     const Q8Group* const (&rows)[R]) {
  constexpr bool kEight = kFormat == Format::Q8_0;
  constexpr int kWords = kEight ? 8 : 4;
  if constexpr (kTwoRegisters) {  // sums of nibbles in 16 bits, then of those in 32
    I32 sums[R];
RL_UNROLL
    for (int plane = 0; plane < 2; plane++) {
      if (kEight || plane == 0) {
RL_UNROLL
        for (int r = 0; r < R; r++) sums[r] = zero_i();
      }
RL_UNROLL
      for (int j = 0; j < kWords; j++) {
        const I32 w = plane ? high_nibbles(load_i(codes + 128 * j)) : low_nibbles(load_i(codes + 128 * j));
RL_UNROLL
        for (int r = 0; r < R; r++)
          sums[r] = dot_u4s8(sums[r], w, splat_word(rows[r]->codes + (kEight ? 0 : 16 * plane) + 4 * j));
      }
      if (kEight || plane == 1) {
RL_UNROLL
        for (int r = 0; r < R; r++) acc[r][0] = add_pairs(acc[r][0], sums[r], kEight && plane ? 16 : 1);
      }
    }
  } else {
RL_UNROLL
    for (int j = 0; j < kWords; j++) {
      const I32 a = load_i(codes + 128 * j), b = load_i(codes + 128 * j + 64);
      const I32 low[2] = {kEight ? a : low_nibbles(a), kEight ? b : low_nibbles(b)};
      const I32 high[2] = {high_nibbles(a), high_nibbles(b)};
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_word(rows[r]->codes + 4 * j);
        acc[r][0] = dot_u8s8(acc[r][0], low[0], x);
        acc[r][1] = dot_u8s8(acc[r][1], low[1], x);
        if constexpr (!kEight) {
          x = splat_word(rows[r]->codes + 16 + 4 * j);
          acc[r][0] = dot_u8s8(acc[r][0], high[0], x);
          acc[r][1] = dot_u8s8(acc[r][1], high[1], x);
        }
      }
    }
  }
}

inline constexpr int kLinesPerGroup = 6;  // of other memory, fetched meanwhile, or a multiple of them

// A group's accumulators before its products.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void start_group(I32 (&acc)[R][kWidth], const Q8Group* const (&rows)[R]) {
RL_UNROLL
  for (int r = 0; r < R; r++) {
    acc[r][0] = zero_i();
    if constexpr (kZeroPoint<kFormat> != 0)
      acc[r][0] = splat_i((int32_t)(0u - kZeroPoint<kFormat> * (uint32_t)rows[r]->sum));
    acc[r][kWidth - 1] = acc[r][0];
  }
}

// out[r] += the group's sums by the scales of the weights and of the row, and its minima, for the vectors from `c` on;
// `scales` are followed by the minima.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void add_group(F32 (&out)[R][2], int c, const I32 (&acc)[R][kWidth],
                                                     const uint8_t* scales, const Q8Group* const (&rows)[R]) {
  constexpr bool kMinima = kFormat == Format::Q4_1;
RL_UNROLL
  for (int i = 0; i < kWidth; i++) {
    const F32 scale = load_f16(scales + 32 * (c + i)), minimum = kMinima ? load_f16(scales + 64 + 32 * (c + i)) : zero_f();
RL_UNROLL
    for (int r = 0; r < R; r++) {
      out[r][c + i] = fma(to_f(acc[r][i]), mul(scale, splat(rows[r]->scale)), out[r][c + i]);
      if (kMinima) out[r][c + i] = fma(minimum, splat(rows[r]->scaled_sum), out[r][c + i]);
    }
  }
}

// The first group of each of R rows that lie `stride` bytes apart, and the group after each.
template <int R>
inline __attribute__((always_inline)) void start_rows(const Q8Group* (&rows)[R], const uint8_t* x, size_t stride) {
RL_UNROLL
  for (int r = 0; r < R; r++) rows[r] = (const Q8Group*)(x + r * stride);
}
template <int R>
inline __attribute__((always_inline)) void next_group(const Q8Group* (&rows)[R]) {
RL_UNROLL
  for (int r = 0; r < R; r++) rows[r]++;
}

// One or two rows of `x` (q8, `stride` bytes apart) by P panels side by side, which arrive from memory as they are
// read: out[p][r]. What lies `ahead` bytes further on is fetched meanwhile, if that is not 0.
template <Format kFormat, int R, int P>
inline __attribute__((always_inline)) void stream_q8(F32 (&result)[P][R][2], int k, const uint8_t* const (&panels)[P],
                                                     const uint8_t* x, size_t stride, size_t ahead) {
  constexpr int kRecord = record_bytes(kFormat), kCodes = code_bytes(kFormat);
  const bool second = fetching.stream_second_level;
  const Q8Group* rows[R];
  start_rows<R>(rows, x, stride);
  F32 out[P][R][2];  // a local array: GCC 12 may store the caller's once a group
RL_UNROLL
  for (int p = 0; p < P; p++)
RL_UNROLL
    for (int r = 0; r < R; r++) out[p][r][0] = out[p][r][1] = zero_f();
  for (int g = 0; g < k / kGroup; g++, next_group<R>(rows)) {
RL_UNROLL
    for (int p = 0; p < P; p++) {
      const uint8_t* record = panels[p] + (size_t)g * kRecord;
      if (ahead) prefetch_lines<(kRecord + 63) / 64>(record + ahead, second);
RL_UNROLL
      for (int c = 0; c < 2; c += kWidth) {
        I32 acc[R][kWidth];
        start_group<kFormat, R>(acc, rows);
        dot_group<kFormat, R>(acc, record + 64 * c, rows);
        add_group<kFormat, R>(out[p], c, acc, record + kCodes, rows);
      }
    }
  }
RL_UNROLL
  for (int p = 0; p < P; p++)
RL_UNROLL
    for (int r = 0; r < R; r++) result[p][r][0] = out[p][r][0], result[p][r][1] = out[p][r][1];
}

// The same for more rows and one panel. Also fetched meanwhile is what is wanted from `elsewhere`.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm_q8(F32 (&out)[R][2], int k, const uint8_t* panel, const uint8_t* x,
                                                   size_t stride, size_t ahead, const Runs& elsewhere) {
  constexpr int kRecord = record_bytes(kFormat), kCodes = code_bytes(kFormat);
  const bool second = fetching.second_level;
  Fetcher fetcher(elsewhere);
  for (int c = 0; c < 2; c += kWidth) {
    const Q8Group* rows[R];
    start_rows<R>(rows, x, stride);
RL_UNROLL
    for (int r = 0; r < R; r++) out[r][c] = out[r][c + kWidth - 1] = zero_f();
    const uint8_t* record = panel;
    for (int g = 0; g < k / kGroup; g++, record += kRecord, next_group<R>(rows)) {
      I32 acc[R][kWidth];
      start_group<kFormat, R>(acc, rows);
      if (ahead && c == 0) prefetch_lines<(kRecord + 63) / 64>(record + ahead, second);
      if (c == 0) fetcher.fetch<kLinesPerGroup>();
      dot_group<kFormat, R>(acc, record + 64 * c, rows);
      add_group<kFormat, R>(out, c, acc, record + kCodes, rows);
    }
  }
}

}  // namespace ridgeline::RL_ISA
