// The integer matrix product: int8 activations by 4- or 8-bit weights, R rows by C tiles at a time.
//
// One output element is accumulated over groups of K in ascending order, whatever R and C:
//   exact integer sum over 32 products, one conversion, one fused multiply-add by scale_w * scale_a,
//   and for formats with a minimum one by minimum * (scale_a * sum a).
// So a row's result does not depend on the rows computed beside it.
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

inline I32 splat_word(const int8_t* p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return splat_i(w);
}

template <Format kFormat>
struct Weights;

// 4-bit codes: one record of 64 bytes serves k = 4j .. 4j+3 and k = 16+4j .. 16+4j+3.
struct FourBit {
  static constexpr int kRecords = 4;
  template <int R, int C>
  static inline __attribute__((always_inline)) void dot(I32 (&acc)[R][C], const uint8_t* const (&codes)[C],
                                                        const int8_t* const (&a)[R]) {
RL_UNROLL
    for (int j = 0; j < kRecords; j++) {
      I32 lo[C], hi[C];
RL_UNROLL
      for (int c = 0; c < C; c++) {
        I32 w = load_i(codes[c] + 64 * j);
        lo[c] = low_nibbles(w);
        hi[c] = high_nibbles(w);
      }
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_word(a[r] + 4 * j);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = dot_u8s8(acc[r][c], lo[c], x);
        x = splat_word(a[r] + 16 + 4 * j);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = dot_u8s8(acc[r][c], hi[c], x);
      }
    }
  }
};
template <>
struct Weights<Format::Q4_1> : FourBit {
  static constexpr int kZero = 0;
  static constexpr bool kMinimum = true;
};
template <>
struct Weights<Format::Q4_0> : FourBit {
  static constexpr int kZero = 8;
  static constexpr bool kMinimum = false;
};
template <>
struct Weights<Format::Q8_0> {
  static constexpr int kZero = 128;
  static constexpr bool kMinimum = false;
  template <int R, int C>
  static inline __attribute__((always_inline)) void dot(I32 (&acc)[R][C], const uint8_t* const (&codes)[C],
                                                        const int8_t* const (&a)[R]) {
RL_UNROLL
    for (int j = 0; j < 8; j++) {
      I32 w[C];
RL_UNROLL
      for (int c = 0; c < C; c++) w[c] = load_i(codes[c] + 64 * j);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_word(a[r] + 4 * j);
RL_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = dot_u8s8(acc[r][c], w[c], x);
      }
    }
  }
};

// out[r][c] = rows r of `a` (q8 rows, `stride` bytes apart) times tile c.
template <Format kFormat, int R, int C>
inline __attribute__((always_inline)) void gemm_q8(F32 (&out)[R][C], const PackedMatrix& w,
                                                   const uint8_t* const (&tiles)[C], const int8_t* a, size_t stride) {
  using W = Weights<kFormat>;
  constexpr int kGroupBytes = code_bytes_per_group(kFormat);
  const int groups = w.k / kGroup;
  const int8_t* rows[R];
  const uint8_t* codes[C];
RL_UNROLL
  for (int r = 0; r < R; r++) rows[r] = a + r * stride;
RL_UNROLL
  for (int c = 0; c < C; c++) codes[c] = tiles[c];
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) out[r][c] = zero_f();
  const size_t scales_at = q8_scales_at(w.k), scaled_sums_at = q8_scaled_sums_at(w.k), sums_at = q8_sums_at(w.k);
  for (int g = 0; g < groups; g++) {
    I32 acc[R][C];
RL_UNROLL
    for (int r = 0; r < R; r++) {
      I32 init = zero_i();
      if constexpr (W::kZero != 0) init = splat_i(-W::kZero * ((const int32_t*)(a + r * stride + sums_at))[g]);
RL_UNROLL
      for (int c = 0; c < C; c++) acc[r][c] = init;
    }
    W::template dot<R, C>(acc, codes, rows);
    F32 scale[C], minimum[C];
RL_UNROLL
    for (int c = 0; c < C; c++) {
      scale[c] = load_f16(tiles[c] + w.scales_at + 32 * g);
      if constexpr (W::kMinimum) minimum[c] = load_f16(tiles[c] + w.minima_at + 32 * g);
    }
RL_UNROLL
    for (int r = 0; r < R; r++) {
      const int8_t* row = a + r * stride;
      F32 s = splat(((const float*)(row + scales_at))[g]);
RL_UNROLL
      for (int c = 0; c < C; c++) out[r][c] = fma(to_f(acc[r][c]), mul(scale[c], s), out[r][c]);
      if constexpr (W::kMinimum) {
        F32 t = splat(((const float*)(row + scaled_sums_at))[g]);
RL_UNROLL
        for (int c = 0; c < C; c++) out[r][c] = fma(minimum[c], t, out[r][c]);
      }
    }
RL_UNROLL
    for (int c = 0; c < C; c++) codes[c] += kGroupBytes;
RL_UNROLL
    for (int r = 0; r < R; r++) rows[r] += kGroup;
  }
}

}  // namespace ridgeline::RL_ISA
