// Storing a vector pair of fp32 results in the activation type the next operator multiplies.
#pragma once

#include <limits>

#include "isa/isa.h"
#include "packed.h"
#include "step.h"
#if defined(RL_ISA_AVX512) || defined(RL_ISA_AMX)
#include "kernels/quantize_avx512.h"
#endif

namespace ridgeline::RL_ISA {

// A group of a row of q8.
inline Q8Group* q8_group(uint8_t* row, int g) { return (Q8Group*)row + g; }

#if !defined(RL_ISA_AVX512) && !defined(RL_ISA_AMX)
using CodeVector = I32;  // sixteen codes
inline CodeVector codes_of(F32 x) { return max_i(to_i(x), splat_i(kLeastCode)); }  // of no number too
inline void store_codes(int8_t* p, CodeVector x) { store_i8(p, x); }

// Stores the numbers behind N groups' codes (`low` and `high` halves); scales are in the lanes of kLaneOf.
template <int N>
inline __attribute__((always_inline)) void store_numbers(Q8Group* const* at, const I32 (&low)[8], const I32 (&high)[8],
                                                         F32 scale) {
  I32 total[8];
RL_UNROLL
  for (int i = 0; i < 8; i++) total[i] = i < N ? add_i(low[i], high[i]) : zero_i();
  const I32 sum = reduce_add8(total);
  alignas(64) float scales[16], scaled_sums[16];
  alignas(64) int32_t sums[16];
  store_f(scales, scale);
  store_f(scaled_sums, mul(scale, to_f(sum)));
  store_i(sums, sum);
RL_UNROLL
  for (int i = 0; i < N; i++) {
    at[i]->scale = scales[kLaneOf[i]];
    at[i]->scaled_sum = scaled_sums[kLaneOf[i]];
    at[i]->sum = sums[kLaneOf[i]];
    at[i]->paired = 0;
  }
}
#endif

// Quantizes N groups of 32 values (a then b), as packed.h says: codes rounded to even.
template <int N>
inline __attribute__((always_inline)) void store_q8(const F32* a, const F32* b, Q8Group* const* at) {
  static_assert(N <= 8);
  I32 top[8], bottom[8];
  // Numbers are compared as integers: signed, the largest is the greatest, unsigned, the lowest if any is negative. NaN is
  // the extreme one way or the other, and makes its group's scale NaN.
RL_UNROLL
  for (int i = 0; i < 8; i++) {
    top[i] = i < N ? max_i(bits(a[i]), bits(b[i])) : zero_i();
    bottom[i] = i < N ? max_u(bits(a[i]), bits(b[i])) : zero_i();
  }
  const F32 positive = from_bits(max_i(reduce_max8(top), zero_i()));
  const F32 negative = from_bits(max_i(xor_i(reduce_max_u8(bottom), splat_i(INT32_MIN)), zero_i()));
  const F32 largest = from_bits(max_i(bits(positive), bits(negative)));
  const F32 extent = max(mul(min(positive, negative), splat(kMostCode / -(float)kLeastCode)), largest);  // lets a NaN through
  // A maximum of 0, or too small to invert, would give infinity, and infinity times 0 is no code.
  F32 inverse = min(div(splat(kMostCode), extent), splat(std::numeric_limits<float>::max()));
  F32 scale = div(extent, splat(kMostCode));
  const uint32_t turned = below(positive, negative);
  inverse = blend(turned, sub(zero_f(), inverse), inverse);
  scale = blend(turned, sub(zero_f(), scale), scale);
  alignas(64) float inverses[16];
  store_f(inverses, inverse);
  CodeVector low[8], high[8];
RL_UNROLL
  for (int i = 0; i < 8; i++) {
    const F32 factor = splat(inverses[kLaneOf[i]]);
    low[i] = i < N ? codes_of(mul(a[i], factor)) : CodeVector{};
    high[i] = i < N ? codes_of(mul(b[i], factor)) : CodeVector{};
    if (i >= N) continue;
    store_codes(at[i]->codes, low[i]);
    store_codes(at[i]->codes + 16, high[i]);
  }
  store_numbers<N>(at, low, high, scale);
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

// Groups [g, g + N) of a row; x points at the first of their values.
template <int N>
inline void store_groups(uint8_t* row, int g, const float* x) {
  F32 a[N], b[N];
  Q8Group* at[N];
  for (int i = 0; i < N; i++) {
    a[i] = load_f(x + kGroup * i);
    b[i] = load_f(x + kGroup * i + 16);
    at[i] = q8_group(row, g + i);
  }
  store_q8<N>(a, b, at);
}

// Columns [from, from + n) of a row; x points at the first of them. A q8 row takes whole groups.
inline void store_columns(Dtype dtype, uint8_t* row, const float* x, int from, int n) {
  int i = 0;
  if (dtype == Dtype::Q8) {
    for (; i + 8 * kGroup <= n; i += 8 * kGroup) store_groups<8>(row, (from + i) / kGroup, x + i);
    for (; i + 2 * kGroup <= n; i += 2 * kGroup) store_groups<2>(row, (from + i) / kGroup, x + i);
    for (; i + kGroup <= n; i += kGroup) store_groups<1>(row, (from + i) / kGroup, x + i);
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

inline void store_row(Dtype dtype, uint8_t* row, int k, const float* x) { store_columns(dtype, row, x, 0, k); }

}  // namespace ridgeline::RL_ISA
