// What is stored behind the codes of quantized activations, where byte products sum the codes (quantize.h).
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

using CodeVector = __m128i;  // sixteen codes
// The lower bound is for the not-a-numbers of a group with infinities, which no code may turn into numbers out of range.
inline CodeVector codes_of(F32 x) { return _mm_max_epi8(_mm512_cvtsepi32_epi8(to_i(x)), _mm_set1_epi8(kLeastCode)); }
inline void store_codes(int8_t* p, CodeVector x) { _mm_storeu_si128((__m128i*)p, x); }

// Stores the numbers behind N groups' codes (`low` and `high` halves); scales are in the lanes of kLaneOf. Four groups'
// codes fill a register, where byte products sum them by fours.
template <int N>
inline __attribute__((always_inline)) void store_numbers(Q8Group* const* at, const __m128i (&low)[8],
                                                         const __m128i (&high)[8], F32 scale) {
  auto four = [](const __m128i* x) {
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  };
  const I32 one = _mm512_set1_epi8(1), first_bias = _mm512_set1_epi8(kFirstBias), second_bias = _mm512_set1_epi8(kSecondBias);
  I32 sums[2];  // by 128 bits, a group's sum and pairs, twice
RL_UNROLL
  for (int i = 0; i < (N + 3) / 4; i++) {
    const I32 x = four(low + 4 * i), y = four(high + 4 * i);
    const I32 sum = dot_u8s8(dot_u8s8(zero_i(), one, x), one, y);
    const I32 u = _mm512_add_epi8(x, first_bias), v = _mm512_add_epi8(y, second_bias);
    const I32 pairs = _mm512_maskz_dpbusd_epi32(0x1111 * ((1 << kPairedWords) - 1), zero_i(), u, v);
    const I32 twos = add_i(_mm512_unpacklo_epi32(sum, pairs), _mm512_unpackhi_epi32(sum, pairs));
    sums[i] = add_i(twos, _mm512_shuffle_epi32(twos, (_MM_PERM_ENUM)0x4e));
  }
  const I32 offset = _mm512_set1_epi64((int64_t)(4 * kPairedWords * kFirstBias * kSecondBias) << 32);
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

}  // namespace ridgeline::RL_ISA
