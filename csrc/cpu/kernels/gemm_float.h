// The float matrix product: fp32 activations by fp32 or fp16 weights, bf16 activations by bf16 weights.
// One output element is one chain of fused multiply-adds over K in ascending order, whatever R and C.
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

template <Format kFormat, int R, int C>
inline __attribute__((always_inline)) void gemm_float(F32 (&out)[R][C], const PackedMatrix& w,
                                                      const uint8_t* const (&tiles)[C], const uint8_t* a,
                                                      size_t stride) {
RL_UNROLL
  for (int r = 0; r < R; r++)
RL_UNROLL
    for (int c = 0; c < C; c++) out[r][c] = zero_f();
  constexpr size_t kStepBytes = kFormat == Format::F16 ? 32 : 64;
  const int steps = kFormat == Format::BF16 ? w.k / 2 : w.k;
  for (int i = 0; i < steps; i++) {
    if constexpr (kFormat == Format::BF16) {
      I32 v[C];
RL_UNROLL
      for (int c = 0; c < C; c++) v[c] = load_i(tiles[c] + kStepBytes * i);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        I32 x = splat_i(((const int32_t*)(a + r * stride))[i]);
RL_UNROLL
        for (int c = 0; c < C; c++) out[r][c] = dot_bf16(out[r][c], v[c], x);
      }
    } else {
      F32 v[C];
RL_UNROLL
      for (int c = 0; c < C; c++)
        v[c] = kFormat == Format::F16 ? load_f16(tiles[c] + kStepBytes * i) : load_f(tiles[c] + kStepBytes * i);
RL_UNROLL
      for (int r = 0; r < R; r++) {
        F32 x = splat(((const float*)(a + r * stride))[i]);
RL_UNROLL
        for (int c = 0; c < C; c++) out[r][c] = fma(v[c], x, out[r][c]);
      }
    }
  }
}

}  // namespace ridgeline::RL_ISA
