// Where a key or value lies in the paged cache (layout: KvCache in step.h), and how it gets there: rotary
// embedding (Su et al., 2021; half-split convention), rounding, the write.
#pragma once

#include <bit>
#include <cstring>
#include <limits>

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

template <Dtype kType>
struct Kv {
  static constexpr int kPair = kType == Dtype::Q8 ? 4 : kType == Dtype::BF16 ? 2 : 1;   // dims (keys) or tokens (values) side by side
};

// What follows the two planes of bytes of an int8 query: q = scale * (128 * high + low), and 128 times the sum of those
// integers, which is what the keys' offset of 128 adds to a dot product.
struct Int8Query {
  float scale;
  int32_t bias;
};
inline constexpr int kMaxInt8Query = 127 * 128 + 63;

// Bytes of one query value: bf16 beside a bf16 cache, else fp32 (an int8 query fits in as much).
inline constexpr size_t query_bytes(Dtype cache) { return cache == Dtype::BF16 ? 2 : 4; }

// The keys of one KV head in a block; its values follow keys_bytes later.
inline uint8_t* keys_at(const KvCache& c, int block, int layer, int head) {
  return c.keys(block, layer, head);
}

inline void rotate(float* out, const float* in, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    float a = in[i], b = in[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

// Rounds n values (a multiple of 16) to the cache's type.
template <Dtype kType>
inline void convert(void* out, const float* in, int n) {
  for (int i = 0; i < n; i += 16) {
    F32 x = load_f(in + i);
    if constexpr (kType == Dtype::BF16) store_bf16((uint16_t*)out + i, x);
    if constexpr (kType == Dtype::F16) store_f16((uint16_t*)out + i, x);
    if constexpr (kType == Dtype::F32) store_f((float*)out + i, x);
  }
}

// The largest magnitude of n values, a multiple of 16; NaN if one is.
inline float magnitude(const float* x, int n) {
  I32 top = zero_i();  // compared as integers, where NaN is the largest
  for (int i = 0; i < n; i += 16) top = max_i(top, bits(abs(load_f(x + i))));
  return std::bit_cast<float>(reduce_max_i(top));
}

// What brings magnitudes up to `largest` to `most`; finite, as infinity times 0 is no code.
inline F32 inverse_scale(float most, float largest) {
  return min(div(splat(most), splat(largest)), splat(std::numeric_limits<float>::max()));
}

// store(i, codes from i on, 16 each) of n values in int8, relative to the largest magnitude; returns their scale.
template <class Store>
inline float quantize_head(const float* x, int n, Store store) {
  const float largest = magnitude(x, n);
  const F32 inverse = inverse_scale(127.0f, largest);
  for (int i = 0; i < n; i += 16) store(i, to_i(mul(load_f(x + i), inverse)));
  return largest / 127.0f;
}

// Writes one token's key and value of one head to an int8 cache.
inline void write_int8_head(uint8_t* keys, uint8_t* values, int token, int head_dim, const float* k, const float* v) {
  alignas(64) uint8_t codes[kMaxHeadDim];
  ((float*)(keys + kBlock * head_dim))[token] =
      quantize_head(k, head_dim, [&](int d, I32 code) { store_low_bytes(codes + d, add_i(code, splat_i(128))); });
  for (int d = 0; d < head_dim / 4; d++) std::memcpy(keys + 4 * (d * kBlock + token), codes + 4 * d, 4);
  uint8_t* row = values + (size_t)(token / 4) * 4 * head_dim;
  ((float*)(values + kBlock * head_dim))[token] =
      quantize_head(v, head_dim, [&](int d, I32 code) { store_byte_of_words(row + 4 * d, token % 4, code); });
}

// A rotated query as planes of bytes (high, then low) and what completes them.
inline void quantize_query(const float* x, int n, uint8_t* out) {
  const float largest = magnitude(x, n);
  const F32 inverse = inverse_scale((float)kMaxInt8Query, largest);
  I32 total = zero_i();
  for (int i = 0; i < n; i += 16) {
    const I32 q = to_i(mul(load_f(x + i), inverse));
    total = add_i(total, q);
    // As unsigned the shift below would not keep the sign, so 2^16 is added before and its 512 lost with the byte.
    const I32 high = shift_right<7>(add_i(q, splat_i(64 + (1 << 16))));
    store_low_bytes(out + i, high);
    store_low_bytes(out + n + i, sub_i(add_i(q, splat_i(1 << 16)), shift_left<7>(high)));
  }
  *(Int8Query*)(out + 2 * n) = {largest / (float)kMaxInt8Query, 128 * reduce_add_i(total)};
}

// Writes one token's key and value of one head: keys and values both go across the lanes' direction.
template <Dtype kType>
inline void write_head(uint8_t* keys, uint8_t* values, int token, int head_dim, const float* k, const float* v) {
  if constexpr (kType == Dtype::Q8) return write_int8_head(keys, values, token, head_dim, k, v);
  alignas(64) uint8_t packed[4 * kMaxHeadDim];
  convert<kType>(packed, k, head_dim);
  if constexpr (kType == Dtype::F32) {
    for (int d = 0; d < head_dim; d++) ((float*)keys)[d * kBlock + token] = ((float*)packed)[d];
    convert<kType>((float*)values + token * head_dim, v, head_dim);
  } else if constexpr (kType == Dtype::F16) {
    for (int d = 0; d < head_dim; d++) ((uint16_t*)keys)[d * kBlock + token] = ((uint16_t*)packed)[d];
    convert<kType>((uint16_t*)values + token * head_dim, v, head_dim);
  } else {
    for (int d = 0; d < head_dim / 2; d++) ((uint32_t*)keys)[d * kBlock + token] = ((uint32_t*)packed)[d];
    convert<kType>(packed, v, head_dim);
    uint32_t* row = (uint32_t*)values + token / 2 * head_dim;
    for (int d = 0; d < head_dim; d += 16) store_half_of_words(row + d, token % 2, (uint16_t*)packed + d);
  }
}

// Rotates query head h of token t into `out`, in the type attention multiplies: bf16 beside a bf16 cache, else fp32.
template <Dtype kType>
inline void rope_query(const RopeKvArgs& a, const Step& s, int t, int h, uint8_t* out) {
  const int half = a.head_dim / 2;
  const size_t at = (size_t)s.positions[t] * half;
  alignas(64) float rotated[kMaxHeadDim];
  rotate(rotated, (const float*)s.at(a.qkv, t) + h * a.head_dim, s.rope_cos + at, s.rope_sin + at, half);
  if constexpr (kType == Dtype::BF16) {
    convert<kType>(out, rotated, a.head_dim);
  } else if constexpr (kType == Dtype::Q8) {
    quantize_query(rotated, a.head_dim, out);
  } else {
    std::memcpy(out, rotated, 4 * (size_t)a.head_dim);
  }
}

// Rotates key head h of token t and writes it and its value to the cache.
template <Dtype kType>
inline void rope_key_value(const RopeKvArgs& a, const Step& s, int t, int h) {
  const int dim = a.head_dim, half = dim / 2, position = s.positions[t];
  const size_t at = (size_t)position * half;
  const float* keys = (const float*)s.at(a.qkv, t) + (size_t)(a.heads + h) * dim;
  alignas(64) float rotated[kMaxHeadDim];
  rotate(rotated, keys, s.rope_cos + at, s.rope_sin + at, half);
  int block = s.block_tables[s.request_of[t]][position / kBlock];
  uint8_t* at_block = keys_at(s.cache, block, a.layer, h);
  write_head<kType>(at_block, at_block + s.cache.keys_bytes, position % kBlock, dim, rotated,
                    keys + (size_t)a.kv_heads * dim);
}

}  // namespace ridgeline::RL_ISA
