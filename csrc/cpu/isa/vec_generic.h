// Portable lanes: sixteen of them as a compiler vector, for any target GCC or Clang knows.
// Every primitive means what its AVX-512 sibling means; only fma (two roundings here) differs in bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace ridgeline::RL_ISA {

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef int16_t I16 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));

inline constexpr bool kTwoRegisters = false;  // whether a vector is two registers (isa/vec_avx2.h)

inline F32 zero_f() { return F32{}; }
inline I32 zero_i() { return I32{}; }
inline F32 splat(float x) { return x - F32{}; }
inline I32 splat_i(int32_t x) { return x - I32{}; }
inline F32 load_f(const void* p) { F32 x; std::memcpy(&x, p, 64); return x; }
inline I32 load_i(const void* p) { I32 x; std::memcpy(&x, p, 64); return x; }
inline void store_f(void* p, F32 x) { std::memcpy(p, &x, 64); }
inline void store_i(void* p, I32 x) { std::memcpy(p, &x, 64); }

inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
inline I32 bits(F32 a) { I32 x; std::memcpy(&x, &a, 64); return x; }
inline F32 from_bits(I32 a) { F32 x; std::memcpy(&x, &a, 64); return x; }
inline F32 abs(F32 a) { return from_bits(bits(a) & 0x7fffffff); }
inline F32 to_f(I32 a) { return __builtin_convertvector(a, F32); }
// Adding a number whose last bit is worth 1 rounds as the adder does; larger ones, and NaN, are whole already.
inline F32 round_even(F32 x) {
  const F32 magic = splat(0x1.8p23f), r = (x + magic) - magic;
  return abs(x) < 0x1p22f ? r : x;
}
inline I32 to_i(F32 a) { return __builtin_convertvector(round_even(a), I32); }
inline I32 max_i(I32 a, I32 b) { return a > b ? a : b; }
inline I32 max_u(I32 a, I32 b) { return (U32)a > (U32)b ? a : b; }
inline I32 add_i(I32 a, I32 b) { return a + b; }

inline I32 low_nibbles(I32 w) { return w & 0x0f0f0f0f; }
inline I32 high_nibbles(I32 w) { return (I32)((U32)w >> 4) & 0x0f0f0f0f; }
// The sum of a lane's two 16-bit numbers.
inline I32 add_halves(I16 x) { return ((I32)((U32)(I32)x << 16) >> 16) + ((I32)x >> 16); }
// A product of two bytes fits 16 bits, and every target multiplies those.
inline I32 dot_u8s8(I32 acc, I32 u, I32 s) {
  const I16 even = ((I16)u & 0xff) * ((I16)((U16)(I16)s << 8) >> 8), odd = (I16)((U16)(I16)u >> 8) * ((I16)s >> 8);
  return acc + add_halves(even) + add_halves(odd);
}
inline F32 high_bf16(I32 x) { return from_bits(x & (int32_t)0xffff0000); }
inline F32 low_bf16(I32 x) { return from_bits((I32)((U32)x << 16)); }
inline F32 dot_bf16(F32 acc, I32 a, I32 b) {
  acc = fma(high_bf16(a), high_bf16(b), acc);
  return fma(low_bf16(a), low_bf16(b), acc);
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float magnitude;
  if (exponent == 0) {
    magnitude = (float)fraction * 0x1p-24f;
  } else {
    uint32_t b = exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&magnitude, &b, 4);
  }
  uint32_t b;
  std::memcpy(&b, &magnitude, 4);
  b |= sign;
  std::memcpy(&magnitude, &b, 4);
  return magnitude;
}
inline uint16_t float_to_half(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  uint32_t sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
  if (m > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (m >> 13 & 0x3ff));
  if (m >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (m < 0x38800000) {  // below the smallest normal half: let the float adder round at 2^-24
    float a, magic = 0.5f;
    std::memcpy(&a, &m, 4);
    a += magic;
    std::memcpy(&m, &a, 4);
    return (uint16_t)(sign | (m - 0x3f000000));
  }
  m += 0xfff + (m >> 13 & 1);
  return (uint16_t)(sign | (m - 0x38000000) >> 13);
}
inline F32 load_f16(const void* p) {
  uint16_t h[16];
  std::memcpy(h, p, 32);
  F32 x;
  for (int i = 0; i < 16; i++) x[i] = half_to_float(h[i]);
  return x;
}
inline void store_f16(void* p, F32 x) {
  uint16_t h[16];
  for (int i = 0; i < 16; i++) h[i] = float_to_half(x[i]);
  std::memcpy(p, h, 32);
}
inline void store_bf16(void* p, F32 x) {
  uint16_t h[16];
  I32 b = bits(x);
  for (int i = 0; i < 16; i++) {
    uint32_t v = (uint32_t)b[i];
    bool nan = (v & 0x7fffffff) > 0x7f800000;
    h[i] = (uint16_t)(nan ? v >> 16 | 0x40 : (v + 0x7fff + (v >> 16 & 1)) >> 16);
  }
  std::memcpy(p, h, 32);
}
inline I32 pack_bf16(F32 a, F32 b) {
  uint16_t both[2 * 16];
  store_bf16(both, a);
  store_bf16(both + 16, b);
  return load_i(both);
}
inline void store_i8(void* p, I32 x) {
  int8_t b[16];
  for (int i = 0; i < 16; i++) b[i] = (int8_t)(x[i] < -128 ? -128 : x[i] > 127 ? 127 : x[i]);
  std::memcpy(p, b, 16);
}

inline float reduce_max(F32 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
}
inline int32_t reduce_max_i(I32 x) {
  int32_t m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
}
inline int32_t reduce_add_i(I32 x) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) total += x[i];
  return total;
}
inline float reduce_add(F32 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
inline constexpr int kLaneOf[8] = {0, 1, 2, 3, 4, 5, 6, 7};
inline I32 reduce_max8(const I32 (&v)[8]) {
  I32 x = {};
  for (int i = 0; i < 8; i++)
    for (int lane = 0; lane < 16; lane++) x[i] = v[i][lane] > x[i] ? v[i][lane] : x[i];
  return x;
}
inline I32 reduce_max_u8(const I32 (&v)[8]) {
  I32 r{};
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 16; j++)
      if ((uint32_t)v[i][j] > (uint32_t)r[i]) r[i] = v[i][j];
  return r;
}
inline I32 reduce_add8(const I32 (&v)[8]) {
  I32 x = {};
  for (int i = 0; i < 8; i++)
    for (int lane = 0; lane < 16; lane++) x[i] += v[i][lane];
  return x;
}
inline F32 keep_first(F32 x, int n, F32 other) {
  for (int i = n < 0 ? 0 : n; i < 16; i++) x[i] = other[i];
  return x;
}
inline I32 low_halves(I32 x) { return x & 0xffff; }
// For n of -254 to 254, in two steps, neither of which overflows.
inline F32 scale_by_power(F32 x, F32 n) {
  const I32 whole = __builtin_convertvector(n, I32), part = whole >> 1;
  return x * from_bits((part + 127) << 23) * from_bits((whole - part + 127) << 23);
}
inline F32 scale_down(F32 x, F32 n) { return scale_by_power(x, n); }  // for n of at most 127
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p); }
inline __attribute__((always_inline)) void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }
// Into the first-level cache, to be written.
inline __attribute__((always_inline)) void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }

inline uint32_t lane_bits(I32 chosen) {  // -1 or 0 a lane
  uint32_t b = 0;
  for (int i = 0; i < 16; i++) b |= (uint32_t)(chosen[i] & 1) << i;
  return b;
}
inline uint32_t at_least(F32 a, F32 b) { return lane_bits(a >= b); }
inline uint32_t below(F32 a, F32 b) { return lane_bits(a < b); }
inline F32 blend(uint32_t lanes, F32 x, F32 other) {
  for (int i = 0; i < 16; i++) other[i] = lanes >> i & 1 ? x[i] : other[i];
  return other;
}
inline F32 add_where(uint32_t lanes, F32 a, F32 b) { return blend(lanes, a + b, a); }
template <class T, class V>
inline int pack_lanes(T* p, uint32_t lanes, V x) {
  int n = 0;
  for (; lanes; lanes &= lanes - 1) p[n++] = x[__builtin_ctz(lanes)];
  return n;
}
inline int pack_f(float* p, uint32_t lanes, F32 x) { return pack_lanes(p, lanes, x); }
inline int pack_i(int32_t* p, uint32_t lanes, I32 x) { return pack_lanes(p, lanes, x); }
inline I32 xor_i(I32 a, I32 b) { return a ^ b; }
inline I32 sub_i(I32 a, I32 b) { return (I32)((U32)a - (U32)b); }
template <int kBits>
inline I32 shift_right(I32 a) { return (I32)((U32)a >> kBits); }
template <int kBits>
inline I32 shift_left(I32 a) { return (I32)((U32)a << kBits); }
inline void store_low_bytes(void* p, I32 x) {
  uint8_t b[16];
  for (int i = 0; i < 16; i++) b[i] = (uint8_t)x[i];
  std::memcpy(p, b, 16);
}
inline void store_byte_of_words(void* p, int byte, I32 x) {
  for (int i = 0; i < 16; i++) ((uint8_t*)p)[4 * i + byte] = (uint8_t)x[i];
}
inline void store_half_of_words(void* p, int half, const uint16_t* x) {
  for (int i = 0; i < 16; i++) ((uint16_t*)p)[2 * i + half] = x[i];
}
inline void mul_wide(I32 a, uint32_t by, I32& high, I32& low) {
  for (int i = 0; i < 16; i++) {
    const uint64_t product = (uint64_t)(uint32_t)a[i] * by;
    high[i] = (int32_t)(product >> 32);
    low[i] = (int32_t)product;
  }
}
inline void transpose4(I32 (&w)[4]) {
  I32 r[4];
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 16; i++) r[i % 4][i / 4 * 4 + m] = w[m][i];
  for (int m = 0; m < 4; m++) w[m] = r[m];
}

}  // namespace ridgeline::RL_ISA
