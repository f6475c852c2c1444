// Selects the lanes a translation unit is compiled for. Each file of kernels/ is built once per
// instruction set with RL_ISA set to its name; kernels are written against these primitives alone.
#pragma once

#if defined(RL_ISA_AMX) || defined(RL_ISA_AVX512)
#if defined(RL_ISA_AMX)
#define RL_ISA amx
#else
#define RL_ISA avx512
#endif
// Register blocks must live in registers, so their loops are unrolled whole.
#define RL_UNROLL _Pragma("GCC unroll 16")
#include "vec_avx512.h"
#if defined(RL_ISA_AMX)
#include "tile_amx.h"
#endif
#elif defined(RL_ISA_AVX2)
#define RL_ISA avx2
#define RL_UNROLL _Pragma("GCC unroll 16")
#include "vec_avx2.h"
#else
#define RL_ISA generic
#define RL_UNROLL
#include "vec_generic.h"
#endif

namespace ridgeline::RL_ISA {

inline constexpr int kLanes = 16;

// Four bytes of memory in every lane: four int8 activations, or a pair of bf16.
inline I32 splat_word(const void* p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return splat_i(w);
}

// Polynomials below interpolate at Chebyshev nodes with the constant term held at 1.

// e^x to 1 ulp for x in [-87, 88]; smaller x gives 0 or a denormal, -inf gives 0. Reduced by ln 2 in two parts.
inline F32 exp(F32 x) {
  x = min(splat(128.0f), max(splat(-104.0f), x));  // operand order lets a NaN through
  F32 n = round_even(mul(x, splat(1.44269504088896341f)));
  F32 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F32 p = splat(0.00139336416f);
  p = fma(p, r, splat(0.00836914871f));
  p = fma(p, r, splat(0.0416664667f));
  p = fma(p, r, splat(0.166665047f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

// 2^x for x < 128; exactly 1 at 0. Relative error 1e-8 of the polynomial, or 7e-6 (kShort), a fiftieth of what
// rounding the result to bf16 costs on average.
template <bool kShort>
inline F32 exp2(F32 x) {
  x = max(splat(-150.0f), x);
  F32 n = round_even(x), r = sub(x, n), p;
  if constexpr (kShort) {
    p = splat(0.00965671055f);
    p = fma(p, r, splat(0.0558382832f));
    p = fma(p, r, splat(0.2402253f));
    p = fma(p, r, splat(0.693136752f));
  } else {
    p = splat(0.000154531634f);
    p = fma(p, r, splat(0.00133908633f));
    p = fma(p, r, splat(0.00961808302f));
    p = fma(p, r, splat(0.0555035695f));
    p = fma(p, r, splat(0.240226507f));
    p = fma(p, r, splat(0.693147182f));
  }
  return scale_down(fma(p, r, splat(1.0f)), n);
}

inline F32 silu(F32 x) { return div(x, add(splat(1.0f), exp(sub(zero_f(), x)))); }

// The same, where there is an estimated reciprocal to a relative error of 1e-5, for what is rounded to fewer bits: a
// division takes as long as all of it.
inline F32 silu_short(F32 x) {
#if defined(RL_ISA_AMX) || defined(RL_ISA_AVX512) || defined(RL_ISA_AVX2)
  const F32 power = min(splat(126.0f), mul(x, splat(-1.44269504f)));  // operand order lets a NaN through
  return mul(x, reciprocal(add(splat(1.0f), exp2<true>(power))));
#else
  return silu(x);
#endif
}

}  // namespace ridgeline::RL_ISA
