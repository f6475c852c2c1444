// AVX2 (with FMA, F16C and BMI2): sixteen 32-bit lanes in two registers. Every primitive means what its AVX-512
// sibling means; dot_bf16 (two roundings), reciprocal() and denormals, which a job flushes (team.cpp), differ in bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace ridgeline::RL_ISA {

struct F32 {
  __m256 v[2];
};
struct I32 {
  __m256i v[2];
};

// Of the sixteen registers, then, a block of sums takes two for each vector; products of bytes are summed in 16 bits
// first, and pairs of bf16 are multiplied as fp32.
inline constexpr bool kTwoRegisters = true;

// f of both halves of each argument.
template <class F>
inline __attribute__((always_inline)) F32 halves_f(F f) { return {{f(0), f(1)}}; }
template <class F>
inline __attribute__((always_inline)) I32 halves_i(F f) { return {{f(0), f(1)}}; }

inline F32 splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline I32 splat_i(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline F32 zero_f() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline I32 zero_i() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline F32 load_f(const void* p) { return {{_mm256_loadu_ps((const float*)p), _mm256_loadu_ps((const float*)p + 8)}}; }
inline I32 load_i(const void* p) {
  return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}};
}
inline void store_f(void* p, F32 x) {
  _mm256_storeu_ps((float*)p, x.v[0]);
  _mm256_storeu_ps((float*)p + 8, x.v[1]);
}
inline void store_i(void* p, I32 x) {
  _mm256_storeu_si256((__m256i*)p, x.v[0]);
  _mm256_storeu_si256((__m256i*)p + 1, x.v[1]);
}

inline I32 bits(F32 a) { return {{_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}}; }
inline F32 from_bits(I32 a) { return {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}}; }
inline F32 add(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_add_ps(a.v[h], b.v[h]); }); }
inline F32 sub(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_sub_ps(a.v[h], b.v[h]); }); }
inline F32 mul(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_mul_ps(a.v[h], b.v[h]); }); }
inline F32 div(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_div_ps(a.v[h], b.v[h]); }); }
inline F32 fma(F32 a, F32 b, F32 c) {
  return halves_f([&](int h) { return _mm256_fmadd_ps(a.v[h], b.v[h], c.v[h]); });
}
inline F32 max(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_max_ps(a.v[h], b.v[h]); }); }
inline F32 min(F32 a, F32 b) { return halves_f([&](int h) { return _mm256_min_ps(a.v[h], b.v[h]); }); }
// 1 / a within 2^-22, a normal: Newton's iteration on what the processor estimates. Estimates differ between makers.
inline F32 reciprocal(F32 a) {
  return halves_f([&](int h) {
    const __m256 y = _mm256_rcp_ps(a.v[h]);
    return _mm256_fmadd_ps(y, _mm256_fnmadd_ps(a.v[h], y, _mm256_set1_ps(1.0f)), y);
  });
}
inline F32 to_f(I32 a) { return halves_f([&](int h) { return _mm256_cvtepi32_ps(a.v[h]); }); }
// Rounds to nearest even, the mode a team sets for its jobs.
inline I32 to_i(F32 a) { return halves_i([&](int h) { return _mm256_cvtps_epi32(a.v[h]); }); }
inline F32 round_even(F32 x) { return halves_f([&](int h) { return _mm256_round_ps(x.v[h], 8); }); }
inline I32 max_i(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_max_epi32(a.v[h], b.v[h]); }); }
inline I32 max_u(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_max_epu32(a.v[h], b.v[h]); }); }
inline I32 add_i(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_add_epi32(a.v[h], b.v[h]); }); }
inline I32 sub_i(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_sub_epi32(a.v[h], b.v[h]); }); }
inline I32 and_i(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_and_si256(a.v[h], b.v[h]); }); }
inline I32 xor_i(I32 a, I32 b) { return halves_i([&](int h) { return _mm256_xor_si256(a.v[h], b.v[h]); }); }
template <int kBits>
inline I32 shift_right(I32 a) { return halves_i([&](int h) { return _mm256_srli_epi32(a.v[h], kBits); }); }
template <int kBits>
inline I32 shift_left(I32 a) { return halves_i([&](int h) { return _mm256_slli_epi32(a.v[h], kBits); }); }
inline F32 abs(F32 a) { return from_bits(and_i(bits(a), splat_i(0x7fffffff))); }
inline I32 low_halves(I32 x) { return and_i(x, splat_i(0xffff)); }

// Bytes: both nibbles of each byte of a 64-byte record.
inline I32 low_nibbles(I32 w) { return and_i(w, splat_i(0x0f0f0f0f)); }
inline I32 high_nibbles(I32 w) {
  return low_nibbles(halves_i([&](int h) { return _mm256_srli_epi16(w.v[h], 4); }));
}
// acc[lane] += sum over 4 bytes of unsigned u * signed s, exactly: of the even bytes, then of the odd ones, in 16 bits
// each, since vpmaddubsw saturates.
inline I32 dot_u8s8(I32 acc, I32 u, I32 s) {
  return halves_i([&](int h) {
    const __m256i u_even = _mm256_and_si256(u.v[h], _mm256_set1_epi16(0xff)), u_odd = _mm256_srli_epi16(u.v[h], 8);
    const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s.v[h], 8), 8), s_odd = _mm256_srai_epi16(s.v[h], 8);
    return _mm256_add_epi32(acc.v[h],
                            _mm256_add_epi32(_mm256_madd_epi16(u_even, s_even), _mm256_madd_epi16(u_odd, s_odd)));
  });
}
// 16-bit sums of two products each, of numbers of 4 bits by int8: exact for up to eight additions.
// Assembly, as GCC 12 puts off additions until their terms no longer fit the registers: half the speed.
inline __attribute__((always_inline)) I32 dot_u4s8(I32 acc, I32 u, I32 s) {
  for (int h = 0; h < 2; h++) {
    __m256i products;
    asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                 : "+x"(acc.v[h]), "=&x"(products)
                 : "x"(u.v[h]), "x"(s.v[h]));
  }
  return acc;
}
// acc[lane] += `by` times both of a lane's 16-bit sums.
inline I32 add_pairs(I32 acc, I32 sums, int16_t by) {
  return halves_i([&](int h) {
    return _mm256_add_epi32(acc.v[h], _mm256_madd_epi16(sums.v[h], _mm256_set1_epi16(by)));
  });
}
inline F32 high_bf16(I32 x) { return from_bits(and_i(x, splat_i((int32_t)0xffff0000))); }
inline F32 low_bf16(I32 x) { return from_bits(shift_left<16>(x)); }
// acc[lane] += the products of two bf16 pairs, one after the other.
inline F32 dot_bf16(F32 acc, I32 a, I32 b) {
  acc = fma(high_bf16(a), high_bf16(b), acc);
  return fma(low_bf16(a), low_bf16(b), acc);
}

inline F32 load_f16(const void* p) {
  return halves_f([&](int h) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + h)); });
}
inline void store_f16(void* p, F32 x) {
  for (int h = 0; h < 2; h++) _mm_storeu_si128((__m128i*)p + h, _mm256_cvtps_ph(x.v[h], 0));
}
// Sixteen 32-bit numbers of at most 16 bits, side by side.
inline __m256i pack_halves(I32 x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.v[0], x.v[1]), 0xd8); }
// The upper halves are x rounded to bf16, to nearest even; a NaN stays one.
inline __m256i to_bf16(F32 x) {
  return pack_halves(halves_i([&](int h) {
    const __m256i b = _mm256_castps_si256(x.v[h]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v[h], x.v[h], _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }));
}
inline void store_bf16(void* p, F32 x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
// Both rounded to bf16, a's sixteen first.
inline I32 pack_bf16(F32 a, F32 b) { return {{to_bf16(a), to_bf16(b)}}; }
inline void store_i8(void* p, I32 x) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.v[0], x.v[1]), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
inline void store_low_bytes(void* p, I32 x) {
  const __m256i halves = pack_halves(and_i(x, splat_i(0xff)));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
// The low byte of each lane as one of the four bytes of each word at p. The others may be being written by another
// thread, and AVX2 has no store of chosen bytes.
inline void store_byte_of_words(void* p, int byte, I32 x) {
  alignas(16) uint8_t low[16];
  store_low_bytes(low, x);
  for (int i = 0; i < 16; i++) ((uint8_t*)p)[4 * i + byte] = low[i];
}
// Sixteen 16-bit numbers as one of the two halves of each word at p, likewise.
inline void store_half_of_words(void* p, int half, const uint16_t* x) {
  for (int i = 0; i < 16; i++) ((uint16_t*)p)[2 * i + half] = x[i];
}

// Horizontal: halves, quarters, pairs.
template <class Fold>
inline __attribute__((always_inline)) float reduce(__m256 x, Fold fold) {
  const __m128 a = fold(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = fold(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(fold(b, _mm_shuffle_ps(b, b, 1)));
}
inline float reduce_max(F32 x) {
  return reduce(_mm256_max_ps(x.v[0], x.v[1]), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
inline float reduce_add(F32 x) {
  return reduce(_mm256_add_ps(x.v[0], x.v[1]), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}

// Eight reductions at once: the result of v[i] is in lane kLaneOf[i].
inline constexpr int kLaneOf[8] = {0, 1, 2, 3, 4, 5, 6, 7};
template <class Fold>
inline __attribute__((always_inline)) I32 reduce8(const I32 (&v)[8], Fold fold) {
  __m256i s[8], t[4], u[2];
  for (int i = 0; i < 8; i++) s[i] = fold(v[i].v[0], v[i].v[1]);
  for (int i = 0; i < 4; i++)
    t[i] = fold(_mm256_unpacklo_epi32(s[2 * i], s[2 * i + 1]), _mm256_unpackhi_epi32(s[2 * i], s[2 * i + 1]));
  for (int i = 0; i < 2; i++)
    u[i] = fold(_mm256_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm256_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  const __m256i w = fold(_mm256_permute2x128_si256(u[0], u[1], 0x20), _mm256_permute2x128_si256(u[0], u[1], 0x31));
  return {{w, w}};
}
inline I32 reduce_max8(const I32 (&v)[8]) {
  return reduce8(v, [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); });
}
inline I32 reduce_max_u8(const I32 (&v)[8]) {
  return reduce8(v, [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); });
}
inline I32 reduce_add8(const I32 (&v)[8]) {
  return reduce8(v, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); });
}
inline int32_t first_lane(I32 x) { return _mm256_extract_epi32(x.v[0], 0); }
inline int32_t reduce_max_i(I32 x) {
  const I32 same[8] = {x, x, x, x, x, x, x, x};
  return first_lane(reduce_max8(same));
}
inline int32_t reduce_add_i(I32 x) {
  const I32 zero = zero_i(), first[8] = {x, zero, zero, zero, zero, zero, zero, zero};
  return first_lane(reduce_add8(first));
}

// Lanes whose bit is set are all ones, the others 0.
inline I32 lane_mask(uint32_t lanes) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return halves_i([&](int h) {
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int32_t)(lanes >> 8 * h)), bit), bit);
  });
}
// x where a lane's mask is set, else other.
inline F32 choose(I32 mask, F32 x, F32 other) {
  return halves_f([&](int h) { return _mm256_blendv_ps(other.v[h], x.v[h], _mm256_castsi256_ps(mask.v[h])); });
}
inline F32 blend(uint32_t lanes, F32 x, F32 other) { return choose(lane_mask(lanes), x, other); }
// Lanes below n keep x, the others become other.
inline F32 keep_first(F32 x, int n, F32 other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return choose(halves_i([&](int h) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8 * h), lane); }), x, other);
}
// Comparisons give one bit a lane; a NaN compares false.
template <int kPredicate>
inline uint32_t compare(F32 a, F32 b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.v[0], b.v[0], kPredicate)) |
         (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.v[1], b.v[1], kPredicate)) << 8;
}
inline uint32_t at_least(F32 a, F32 b) { return compare<_CMP_GE_OQ>(a, b); }
inline uint32_t below(F32 a, F32 b) { return compare<_CMP_LT_OQ>(a, b); }
// a + b where a lane's bit is set, else a.
inline F32 add_where(uint32_t lanes, F32 a, F32 b) { return blend(lanes, add(a, b), a); }
// Puts the chosen lanes side by side at p, which has room for all 16, and returns how many they are.
inline int pack_i(int32_t* p, uint32_t lanes, I32 x) {
  int count = 0;
  for (int h = 0; h < 2; h++) {
    const uint32_t chosen = lanes >> 8 * h & 0xff;
    const uint64_t bytes = _pdep_u64(chosen, 0x0101010101010101) * 0xff;
    const __m128i order = _mm_cvtsi64_si128((int64_t)_pext_u64(0x0706050403020100, bytes));
    _mm256_storeu_si256((__m256i*)(p + count), _mm256_permutevar8x32_epi32(x.v[h], _mm256_cvtepu8_epi32(order)));
    count += __builtin_popcount(chosen);
  }
  return count;
}
inline int pack_f(float* p, uint32_t lanes, F32 x) { return pack_i((int32_t*)p, lanes, bits(x)); }

// x times 2^n for n of at least -254 and at most 254, in two steps, neither of which overflows.
inline F32 scale_by_power(F32 x, F32 n) {
  return halves_f([&](int h) {
    const __m256i whole = _mm256_cvtps_epi32(n.v[h]), part = _mm256_srai_epi32(whole, 1), one = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(whole, part);
    const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(part, one), 23));
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x.v[h], first), second);
  });
}
// The same for x in [1/2, 2] and n of at most 127, in one step; 0 where the result is no normal number.
inline F32 scale_down(F32 x, F32 n) {
  return halves_f([&](int h) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v[h]), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x.v[h], _mm256_castsi256_ps(
                                     _mm256_slli_epi32(_mm256_max_epi32(exponent, _mm256_setzero_si256()), 23)));
  });
}
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
// Into the second-level cache, not on to the first.
inline __attribute__((always_inline)) void prefetch_second(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
// Into the first-level cache, to be written.
inline __attribute__((always_inline)) void prefetch_write(const void* p) { _m_prefetchw((void*)p); }

// Both halves of the 64-bit products of unsigned lanes.
inline void mul_wide(I32 a, uint32_t by, I32& high, I32& low) {
  const __m256i b = _mm256_set1_epi32((int32_t)by);
  for (int h = 0; h < 2; h++) {
    const __m256i even = _mm256_mul_epu32(a.v[h], b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v[h], 32), b);
    low.v[h] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high.v[h] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
}
// Lanes as 4 x 4: lane 4 i + j of vector m becomes lane 4 i + m of vector j.
inline void transpose4(I32 (&w)[4]) {
  for (int h = 0; h < 2; h++) {
    const __m256i a = _mm256_unpacklo_epi32(w[0].v[h], w[1].v[h]), b = _mm256_unpackhi_epi32(w[0].v[h], w[1].v[h]);
    const __m256i c = _mm256_unpacklo_epi32(w[2].v[h], w[3].v[h]), d = _mm256_unpackhi_epi32(w[2].v[h], w[3].v[h]);
    w[0].v[h] = _mm256_unpacklo_epi64(a, c);
    w[1].v[h] = _mm256_unpackhi_epi64(a, c);
    w[2].v[h] = _mm256_unpacklo_epi64(b, d);
    w[3].v[h] = _mm256_unpackhi_epi64(b, d);
  }
}

}  // namespace ridgeline::RL_ISA
