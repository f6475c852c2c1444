// Selects the lanes a translation unit is compiled for. Each file of kernels/ is built once per
// instruction set with RL_ISA set to its name; kernels are written against these primitives alone.
#pragma once

#if defined(RL_ISA_AVX512)
#define RL_ISA avx512
// Register blocks must live in registers, so their loops are unrolled whole.
#define RL_UNROLL _Pragma("GCC unroll 16")
#include "vec_avx512.h"
#else
#define RL_ISA generic
#define RL_UNROLL
#include "vec_generic.h"
#endif

namespace ridgeline::RL_ISA {

inline constexpr int kLanes = 16;

// e^x with at most 1 ulp of error for x in [-87, 88]; smaller x gives 0 or a denormal, -inf gives 0.
// Range reduction by ln 2 in two parts, then the Taylor polynomial of degree 7 on [-ln2/2, ln2/2].
inline F32 exp(F32 x) {
  x = max(splat(-104.0f), x);  // operand order lets a NaN through
  F32 n = round_even(mul(x, splat(1.44269504088896341f)));
  F32 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F32 p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

inline F32 silu(F32 x) { return div(x, add(splat(1.0f), exp(sub(zero_f(), x)))); }

}  // namespace ridgeline::RL_ISA
