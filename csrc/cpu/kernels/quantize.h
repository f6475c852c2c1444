// Storing a vector pair of fp32 results in the activation type the next operator multiplies.
#pragma once

#include <limits>

#include "isa/isa.h"
#include "packed.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// Where one group of a q8 row goes.
struct Q8Place {
  uint8_t* codes;
  float *scale, *scaled_sum;
  int32_t* sum;
};
inline Q8Place q8_place(uint8_t* row, int k, int g) {
  return {row + kGroup * g, (float*)(row + q8_scales_at(k)) + g, (float*)(row + q8_scaled_sums_at(k)) + g,
          (int32_t*)(row + q8_sums_at(k)) + g};
}

// Quantizes N groups of 32 values (a then b): scale = max|x| / 127, codes rounded to even.
template <int N>
inline __attribute__((always_inline)) void store_q8(const F32* a, const F32* b, const Q8Place* at) {
  static_assert(N <= 8);
  I32 top[8], total[8];
  // Magnitudes are compared as integers, where NaN is the largest: one NaN makes its group's scale NaN.
RL_UNROLL
  for (int i = 0; i < 8; i++) top[i] = i < N ? max_i(bits(abs(a[i])), bits(abs(b[i]))) : zero_i();
  const F32 largest = from_bits(reduce_max8(top));
  // A maximum of 0, or too small to invert, would give infinity, and infinity times 0 is no code.
  const F32 inverse = min(div(splat(127.0f), largest), splat(std::numeric_limits<float>::max()));
  alignas(64) float scales[16], inverses[16], scaled_sums[16];
  alignas(64) int32_t sums[16];
  const F32 scale = div(largest, splat(127.0f));
  store_f(scales, scale);
  store_f(inverses, inverse);
RL_UNROLL
  for (int i = 0; i < N; i++) {
    const F32 factor = splat(inverses[kLaneOf[i]]);
    const I32 low = to_i(mul(a[i], factor)), high = to_i(mul(b[i], factor));
    store_i8(at[i].codes, low);
    store_i8(at[i].codes + 16, high);
    total[i] = add_i(low, high);
  }
RL_UNROLL
  for (int i = N; i < 8; i++) total[i] = zero_i();
  const I32 sum = reduce_add8(total);
  store_i(sums, sum);
  store_f(scaled_sums, mul(scale, to_f(sum)));
RL_UNROLL
  for (int i = 0; i < N; i++) {
    *at[i].scale = scales[kLaneOf[i]];
    *at[i].scaled_sum = scaled_sums[kLaneOf[i]];
    *at[i].sum = sums[kLaneOf[i]];
  }
}

// A gated epilogue's result, for a row of type `out`.
inline F32 gated(Dtype out, F32 gate, F32 up) { return mul(out == Dtype::F32 ? silu(gate) : silu_short(gate), up); }

// Stores columns [16 * i, 16 * i + 32) of a row of fp32 or bf16; i counts vectors.
inline void store_pair(Dtype dtype, uint8_t* row, int i, F32 a, F32 b) {
  if (dtype == Dtype::BF16) {
    store_bf16(row + 32 * i, a);
    store_bf16(row + 32 * i + 32, b);
  } else {
    store_f(row + 64 * i, a);
    store_f(row + 64 * i + 64, b);
  }
}

// Groups [g, g + N) of a row of k values; x points at the first of them.
template <int N>
inline void store_groups(uint8_t* row, int k, int g, const float* x) {
  F32 a[N], b[N];
  Q8Place at[N];
  for (int i = 0; i < N; i++) {
    a[i] = load_f(x + kGroup * i);
    b[i] = load_f(x + kGroup * i + 16);
    at[i] = q8_place(row, k, g + i);
  }
  store_q8<N>(a, b, at);
}

// Columns [from, from + n) of a row of k values; x points at the first of them. A q8 row takes whole groups.
inline void store_columns(Dtype dtype, uint8_t* row, int k, const float* x, int from, int n) {
  int i = 0;
  if (dtype == Dtype::Q8) {
    for (; i + 8 * kGroup <= n; i += 8 * kGroup) store_groups<8>(row, k, (from + i) / kGroup, x + i);
    for (; i + 2 * kGroup <= n; i += 2 * kGroup) store_groups<2>(row, k, (from + i) / kGroup, x + i);
    for (; i + kGroup <= n; i += kGroup) store_groups<1>(row, k, (from + i) / kGroup, x + i);
    return;
  }
  const size_t width = dtype == Dtype::BF16 ? 2 : 4;
  uint8_t* out = row + width * from;
  for (; i + 32 <= n; i += 32) store_pair(dtype, out, i / 16, load_f(x + i), load_f(x + i + 16));
  if (i == n) return;
  float tail[32] = {};
  for (int j = i; j < n; j++) tail[j - i] = x[j];
  alignas(64) uint8_t stored[128];
  store_pair(dtype, stored, 0, load_f(tail), load_f(tail + 16));
  __builtin_memcpy(out + width * i, stored, width * (n - i));
}

inline void store_row(Dtype dtype, uint8_t* row, int k, const float* x) { store_columns(dtype, row, k, x, 0, k); }

}  // namespace ridgeline::RL_ISA
