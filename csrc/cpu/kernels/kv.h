// Where a key or value lies in the paged cache (layout: KvCache in step.h), and how it gets there: rotary
// embedding (Su et al., 2021; half-split convention), rounding, the write.
#pragma once

#include <cstring>

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

template <Dtype kType>
struct Kv {
  static constexpr int kPair = kType == Dtype::BF16 ? 2 : 1;   // dims (keys) or tokens (values) side by side
};

// Bytes of one query value: bf16 beside a bf16 cache, else fp32.
inline constexpr size_t query_bytes(Dtype cache) { return cache == Dtype::BF16 ? 2 : 4; }

// The keys of one KV head in a block; its values follow run_bytes later.
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

// Writes one token's key and value of one head: keys and values both go across the lanes' direction.
template <Dtype kType>
inline void write_head(uint8_t* keys, uint8_t* values, int token, int head_dim, const float* k, const float* v) {
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
    uint16_t* row = (uint16_t*)values + token / 2 * head_dim * 2 + token % 2;
    for (int d = 0; d < head_dim; d++) row[2 * d] = ((uint16_t*)packed)[d];
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
  write_head<kType>(at_block, at_block + s.cache.run_bytes, position % kBlock, dim, rotated,
                    keys + (size_t)a.kv_heads * dim);
}

}  // namespace ridgeline::RL_ISA
