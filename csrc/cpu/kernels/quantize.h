// Storing a vector pair of fp32 results in the activation type the next operator multiplies.
#pragma once

#include <limits>

#include "isa/isa.h"
#include "packed.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// A group of a row of q8.
inline Q8Group* q8_group(uint8_t* row, int g) { return (Q8Group*)row + g; }

// Sixteen codes, and storing the numbers behind N groups' codes; scales are in the lanes of kLaneOf.
#if defined(RL_ISA_AVX512) || defined(RL_ISA_AMX)
using CodeVector = __m128i;
inline CodeVector codes_of(F32 x) { return _mm512_cvtsepi32_epi8(to_i(x)); }
inline void store_codes(int8_t* p, CodeVector x) { _mm_storeu_si128((__m128i*)p, x); }

// Four groups' codes to a register, where byte products sum them by fours; `low`, `high`: each group's, as bytes.
template <int N>
inline __attribute__((always_inline)) void store_numbers(Q8Group* const* at, const __m128i (&low)[8],
                                                         const __m128i (&high)[8], F32 scale) {
  auto four = [](const __m128i* x) {
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  };
  const I32 one = _mm512_set1_epi8(1), low_bias = _mm512_set1_epi8(kLowBias), high_bias = _mm512_set1_epi8(kHighBias);
  I32 sums[2];  // by 128 bits, a group's sum and pairs, twice
RL_UNROLL
  for (int i = 0; i < (N + 3) / 4; i++) {
    const I32 x = four(low + 4 * i), y = four(high + 4 * i);
    const I32 sum = dot_u8s8(dot_u8s8(zero_i(), one, x), one, y);
    const I32 u = _mm512_add_epi8(x, low_bias), v = _mm512_add_epi8(y, high_bias);
    const I32 pairs = _mm512_maskz_dpbusd_epi32(kPairedWords == 4 ? 0xffff : 0x1111 * ((1 << kPairedWords) - 1), zero_i(), u, v);
    const I32 twos = add_i(_mm512_unpacklo_epi32(sum, pairs), _mm512_unpackhi_epi32(sum, pairs));
    sums[i] = add_i(twos, _mm512_shuffle_epi32(twos, (_MM_PERM_ENUM)0x4e));
  }
  if (N <= 4) sums[1] = zero_i();
  const I32 offset = _mm512_set1_epi64((int64_t)(4 * kPairedWords * kLowBias * kHighBias) << 32);
RL_UNROLL
  for (int i = 0; i < (N + 3) / 4; i++) {  // by 128 bits: scale, scaled sum, sum, -pairs
    const F32 own = i == 0 ? _mm512_permute_ps(scale, 0x00) : _mm512_permute_ps(scale, 0x55);
    const F32 scaled = mul(own, to_f(_mm512_shuffle_epi32(sums[i], (_MM_PERM_ENUM)0x00)));
    const I32 whole = _mm512_mask_sub_epi32(sums[i], 0x8888, offset, sums[i]);
    const I32 numbers = bits(_mm512_mask_blend_ps(0xcccc, _mm512_unpacklo_ps(own, scaled), from_bits(whole)));
    const __m128i parts[4] = {_mm512_extracti32x4_epi32(numbers, 0), _mm512_extracti32x4_epi32(numbers, 1),
                              _mm512_extracti32x4_epi32(numbers, 2), _mm512_extracti32x4_epi32(numbers, 3)};
RL_UNROLL
    for (int j = 0; j < 4; j++)
      if (4 * i + j < N) _mm_storeu_si128((__m128i*)&at[4 * i + j]->scale, parts[j]);
  }
}
#else
using CodeVector = I32;
inline CodeVector codes_of(F32 x) { return to_i(x); }
inline void store_codes(int8_t* p, CodeVector x) { store_i8(p, x); }

template <int N>
inline __attribute__((always_inline)) void store_numbers(Q8Group* const* at, const I32 (&low)[8], const I32 (&high)[8],
                                                         F32 scale) {
  I32 total[8], paired[8];
RL_UNROLL
  for (int i = 0; i < 8; i++) {
    total[i] = paired[i] = zero_i();
    if (i >= N) continue;
    total[i] = add_i(low[i], high[i]);
    const I32 terms = mul_i(add_i(low[i], splat_i(kLowBias)), add_i(high[i], splat_i(kHighBias)));
    paired[i] = bits(keep_first(from_bits(terms), 4 * kPairedWords, zero_f()));
  }
  const I32 sum = reduce_add8(total);
  alignas(64) float scales[16], scaled_sums[16];
  alignas(64) int32_t sums[16], pairs[16];
  store_f(scales, scale);
  store_f(scaled_sums, mul(scale, to_f(sum)));
  store_i(sums, sum);
  store_i(pairs, sub_i(splat_i(4 * kPairedWords * kLowBias * kHighBias), reduce_add8(paired)));
RL_UNROLL
  for (int i = 0; i < N; i++) {
    at[i]->scale = scales[kLaneOf[i]];
    at[i]->scaled_sum = scaled_sums[kLaneOf[i]];
    at[i]->sum = sums[kLaneOf[i]];
    at[i]->paired = pairs[kLaneOf[i]];
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
