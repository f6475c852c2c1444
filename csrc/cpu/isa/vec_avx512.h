// AVX-512 (F, BW, VL, DQ, VNNI, BF16, FMA, F16C): sixteen 32-bit lanes in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ridgeline::RL_ISA {

using F32 = __m512;
using I32 = __m512i;
using Mask = __mmask16;

inline constexpr bool kTwoRegisters = false;  // whether a vector is two registers (isa/vec_avx2.h)

inline F32 zero_f() { return _mm512_setzero_ps(); }
inline I32 zero_i() { return _mm512_setzero_si512(); }
inline F32 splat(float x) { return _mm512_set1_ps(x); }
inline I32 splat_i(int32_t x) { return _mm512_set1_epi32(x); }
inline F32 load_f(const void* p) { return _mm512_loadu_ps(p); }
inline I32 load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_f(void* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store_i(void* p, I32 x) { _mm512_storeu_si512(p, x); }

inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
// 1 / a within 2^-22, a normal: Newton's iteration on what the processor estimates. Estimates differ between makers.
inline F32 reciprocal(F32 a) {
  const F32 y = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(a, y, _mm512_set1_ps(1.0f)), y);
}
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 to_f(I32 a) { return _mm512_cvtepi32_ps(a); }
// Rounds to nearest even, the mode a team sets for its jobs.
inline I32 to_i(F32 a) { return _mm512_cvtps_epi32(a); }
inline I32 bits(F32 a) { return _mm512_castps_si512(a); }
inline F32 from_bits(I32 a) { return _mm512_castsi512_ps(a); }
inline I32 max_i(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 max_u(I32 a, I32 b) { return _mm512_max_epu32(a, b); }  // of unsigned numbers
inline I32 add_i(I32 a, I32 b) { return _mm512_add_epi32(a, b); }

// Bytes: both nibbles of each byte of a 64-byte record.
inline I32 low_nibbles(I32 w) { return _mm512_and_si512(w, _mm512_set1_epi8(0x0f)); }
inline I32 high_nibbles(I32 w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(0x0f)); }
// The same, plus 112 and less 16: bits 0x70, and 0xf0 of a signed byte.
inline I32 high_nibbles_plus_112(I32 w) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x70), 0xea);
}
inline I32 low_nibbles_minus_16(I32 w) {
  return _mm512_ternarylogic_epi32(w, _mm512_set1_epi8(0x0f), _mm512_set1_epi8((char)0xf0), 0xea);
}
// acc[lane] += sum over 4 bytes of unsigned u * signed s, exactly.
inline I32 dot_u8s8(I32 acc, I32 u, I32 s) { return _mm512_dpbusd_epi32(acc, u, s); }
// c0[lane] += sum over 4 bytes of (a + high[0]) * (b + low[0]), the first factor unsigned, the second signed; c1 likewise.
// Assembly, as the order decides on which pipes operations wait: in GCC 12's the same takes up to half as long again.
inline __attribute__((always_inline)) void dot_paired(I32& c0, I32& c1, I32 a, I32 b, const I32 (&high)[2],
                                                      const I32 (&low)[2]) {
  I32 x, y;
  asm volatile(
      "vpaddb %[a], %[h0], %[x]\n\tvpaddb %[b], %[l0], %[y]\n\tvpaddb %[a], %[h1], %[a]\n\tvpaddb %[b], %[l1], %[b]\n\t"
      "vpdpbusd %[y], %[x], %[c0]\n\tvpdpbusd %[b], %[a], %[c1]"
      : [c0] "+v"(c0), [c1] "+v"(c1), [a] "+&v"(a), [b] "+&v"(b), [x] "=&v"(x), [y] "=&v"(y)
      : [h0] "v"(high[0]), [h1] "v"(high[1]), [l0] "v"(low[0]), [l1] "v"(low[1]));
}
inline F32 high_bf16(I32 x) { return from_bits(_mm512_and_si512(x, splat_i((int32_t)0xffff0000))); }
inline F32 low_bf16(I32 x) { return from_bits(_mm512_slli_epi32(x, 16)); }
// acc[lane] += the products of two bf16 pairs.
inline F32 dot_bf16(F32 acc, I32 a, I32 b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

inline F32 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_f16(void* p, F32 x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
inline void store_bf16(void* p, F32 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
// Both rounded to bf16, a's sixteen first.
inline I32 pack_bf16(F32 a, F32 b) { return (I32)_mm512_cvtne2ps_pbh(b, a); }

inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
inline int32_t reduce_max_i(I32 x) { return _mm512_reduce_max_epi32(x); }
inline int32_t reduce_add_i(I32 x) { return _mm512_reduce_add_epi32(x); }
// One fixed tree: halves, quarters, pairs.
inline float reduce_add(F32 x) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

// Eight reductions at once: the result of v[i] is in lane kLaneOf[i]. Halves are folded and rows brought together
// in the same shuffles, so eight cost about as much as three one by one.
inline constexpr int kLaneOf[8] = {0, 4, 8, 12, 1, 5, 9, 13};
template <class Fold>
inline __m512 reduce8(const I32 (&v)[8], Fold fold) {
  __m512 t[4], u[2];
  for (int i = 0; i < 4; i++) {
    __m512 a = from_bits(v[2 * i]), b = from_bits(v[2 * i + 1]);
    t[i] = fold(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 2; i++)
    u[i] = fold(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88), _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
  __m512 w = fold(_mm512_unpacklo_ps(u[0], u[1]), _mm512_unpackhi_ps(u[0], u[1]));
  return fold(w, _mm512_permute_ps(w, 0x4e));
}
inline I32 reduce_max8(const I32 (&v)[8]) {
  auto largest = [](__m512 a, __m512 b) { return from_bits(max_i(bits(a), bits(b))); };
  return bits(reduce8(v, largest));
}
inline I32 reduce_max_u8(const I32 (&v)[8]) {
  return bits(reduce8(v, [](__m512 a, __m512 b) { return from_bits(max_u(bits(a), bits(b))); }));
}
inline I32 reduce_add8(const I32 (&v)[8]) {
  auto add = [](__m512 a, __m512 b) { return from_bits(add_i(bits(a), bits(b))); };
  return bits(reduce8(v, add));
}

// Lanes below n keep x, the others become other.
inline F32 keep_first(F32 x, int n, F32 other) {
  Mask m = n >= 16 ? (Mask)0xffff : (Mask)((1u << (n < 0 ? 0 : n)) - 1);
  return _mm512_mask_mov_ps(other, m, x);
}
inline I32 low_halves(I32 x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }
inline F32 scale_by_power(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
inline F32 scale_down(F32 x, F32 n) { return scale_by_power(x, n); }  // for n of at most 127
inline F32 round_even(F32 x) { return _mm512_roundscale_ps(x, 0); }
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
// Into the second-level cache, not on to the first.
inline __attribute__((always_inline)) void prefetch_second(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
// Into the first-level cache, to be written.
inline __attribute__((always_inline)) void prefetch_write(const void* p) { _m_prefetchw((void*)p); }

// Comparisons give one bit a lane; a NaN compares false.
inline uint32_t at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t below(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// x where a lane's bit is set, else other.
inline F32 blend(uint32_t lanes, F32 x, F32 other) { return _mm512_mask_mov_ps(other, (Mask)lanes, x); }
// a + b where a lane's bit is set, else a.
inline F32 add_where(uint32_t lanes, F32 a, F32 b) { return _mm512_mask_add_ps(a, (Mask)lanes, a, b); }
// Puts the chosen lanes side by side at p, which has room for all 16, and returns how many they are.
inline int pack_f(float* p, uint32_t lanes, F32 x) {
  store_f(p, _mm512_maskz_compress_ps((Mask)lanes, x));
  return __builtin_popcount(lanes);
}
inline int pack_i(int32_t* p, uint32_t lanes, I32 x) {
  store_i(p, _mm512_maskz_compress_epi32((Mask)lanes, x));
  return __builtin_popcount(lanes);
}
inline I32 xor_i(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
inline I32 sub_i(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
template <int kBits>
inline I32 shift_right(I32 a) { return _mm512_srli_epi32(a, kBits); }
template <int kBits>
inline I32 shift_left(I32 a) { return _mm512_slli_epi32(a, kBits); }
inline void store_low_bytes(void* p, I32 x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
// The low byte of each lane as one of the four bytes of each word at p, the others being left.
inline void store_byte_of_words(void* p, int byte, I32 x) {
  _mm512_mask_storeu_epi8(p, 0x1111111111111111u << byte, _mm512_sll_epi32(x, _mm_cvtsi32_si128(8 * byte)));
}
// Sixteen 16-bit numbers as one of the two halves of each word at p.
inline void store_half_of_words(void* p, int half, const uint16_t* x) {
  const I32 wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  _mm512_mask_storeu_epi16(p, 0x55555555u << half, _mm512_sll_epi32(wide, _mm_cvtsi32_si128(16 * half)));
}
// Both halves of the 64-bit products of unsigned lanes.
inline void mul_wide(I32 a, uint32_t by, I32& high, I32& low) {
  const I32 b = splat_i((int32_t)by);
  const I32 even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
// Lanes as 4 x 4: lane 4 i + j of vector m becomes lane 4 i + m of vector j.
inline void transpose4(I32 (&w)[4]) {
  const I32 a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
  const I32 c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
  w[0] = _mm512_unpacklo_epi64(a, c);
  w[1] = _mm512_unpackhi_epi64(a, c);
  w[2] = _mm512_unpacklo_epi64(b, d);
  w[3] = _mm512_unpackhi_epi64(b, d);
}

}  // namespace ridgeline::RL_ISA
