// The float matrix product: fp32 activations by fp32 or fp16 weights, bf16 activations by bf16 weights.
// One output element is one chain of fused multiply-adds over K in ascending order, whatever R.
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

// out[r] = row r of `a` (`stride` bytes apart) times a panel's two tiles.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm_float(F32 (&out)[R][2], int k, const uint8_t* panel, const uint8_t* a,
                                                      size_t stride) {
RL_UNROLL
  for (int r = 0; r < R; r++) out[r][0] = out[r][1] = zero_f();
  constexpr int kTileBytes = kFormat == Format::F16 ? 32 : 64;
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
