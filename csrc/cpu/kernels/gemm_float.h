// The float matrix product: fp32 activations by fp32 or fp16 weights, bf16 activations by bf16 weights.
// One output element is one chain of fused multiply-adds over K in ascending order, whatever R.
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

// out[r][c] = row r of `a` times one tile of a panel.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm_float_tile(F32 (&out)[R][2], int c, int k, const uint8_t* tile,
                                                           const uint8_t* a, size_t stride) {
  F32 acc[R];
RL_UNROLL
  for (int r = 0; r < R; r++) acc[r] = zero_f();
  constexpr int kStep = kFormat == Format::F16 ? 64 : 128;
  const int steps = kFormat == Format::BF16 ? k / 2 : k;
  for (int i = 0; i < steps; i++, tile += kStep) {
    if constexpr (kFormat == Format::BF16) {
      const I32 v = load_i(tile);
RL_UNROLL
      for (int r = 0; r < R; r++) acc[r] = dot_bf16(acc[r], v, splat_word(a + r * stride + 4 * i));
    } else {
      const F32 v = kFormat == Format::F16 ? load_f16(tile) : load_f(tile);
RL_UNROLL
      for (int r = 0; r < R; r++) acc[r] = fma(v, splat(((const float*)(a + r * stride))[i]), acc[r]);
    }
  }
RL_UNROLL
  for (int r = 0; r < R; r++) out[r][c] = acc[r];
}

// out[r] = row r of `a` (`stride` bytes apart) times a panel's two tiles.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm_float(F32 (&out)[R][2], int k, const uint8_t* panel, const uint8_t* a,
                                                      size_t stride) {
  constexpr int kTileBytes = kFormat == Format::F16 ? 32 : 64;
  if constexpr (kTwoRegisters) {  // one tile after the other
    for (int c = 0; c < 2; c++) gemm_float_tile<kFormat, R>(out, c, k, panel + c * kTileBytes, a, stride);
    return;
  }
RL_UNROLL
  for (int r = 0; r < R; r++) out[r][0] = out[r][1] = zero_f();
  const int steps = kFormat == Format::BF16 ? k / 2 : k;
  for (int i = 0; i < steps; i++, panel += 2 * kTileBytes) {
    if constexpr (kFormat == Format::BF16) {
      const I32 v[2] = {load_i(panel), load_i(panel + kTileBytes)};
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_i(((const int32_t*)(a + r * stride))[i]);
        out[r][0] = dot_bf16(out[r][0], v[0], x);
        out[r][1] = dot_bf16(out[r][1], v[1], x);
      }
    } else {
      const F32 v[2] = {kFormat == Format::F16 ? load_f16(panel) : load_f(panel),
                        kFormat == Format::F16 ? load_f16(panel + kTileBytes) : load_f(panel + kTileBytes)};
RL_UNROLL
      for (int r = 0; r < R; r++) {
        F32 x = splat(((const float*)(a + r * stride))[i]);
        out[r][0] = fma(v[0], x, out[r][0]);
        out[r][1] = fma(v[1], x, out[r][1]);
      }
    }
  }
}

}  // namespace ridgeline::RL_ISA
