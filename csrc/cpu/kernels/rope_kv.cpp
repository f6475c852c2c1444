// Rotary embedding (Su et al., 2021; half-split convention) of queries and keys, and the cache write.
#include <algorithm>
#include <cstring>

#include "kernels/kv.h"
#include "kernels/table.h"

namespace ridgeline::RL_ISA {
namespace {

void rotate(float* out, const float* in, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    float a = in[i], b = in[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

// Rounds n values (a multiple of 16) to the cache's type.
template <Dtype kType>
void convert(void* out, const float* in, int n) {
  for (int i = 0; i < n; i += 16) {
    F32 x = load_f(in + i);
    if constexpr (kType == Dtype::BF16) store_bf16((uint16_t*)out + i, x);
    if constexpr (kType == Dtype::F16) store_f16((uint16_t*)out + i, x);
    if constexpr (kType == Dtype::F32) store_f((float*)out + i, x);
  }
}

// Writes one token's key and value of one head: keys and values both go across the lanes' direction.
template <Dtype kType>
void write_head(uint8_t* keys, int token, int head_dim, const float* k, const float* v) {
  alignas(64) uint8_t packed[1024];
  uint8_t* values = keys + (size_t)kBlock * head_dim * Kv<kType>::kBytes;
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

template <Dtype kType>
void rope_token(const RopeKvArgs& a, const Step& s, int t) {
  int position = s.positions[t], half = a.head_dim / 2, dim = a.head_dim;
  const float* cos = s.rope_cos + (size_t)position * half;
  const float* sin = s.rope_sin + (size_t)position * half;
  const float* qkv = (const float*)s.at(a.qkv, t);
  alignas(64) float rotated[256];
  // Queries are left in the type attention multiplies: bf16 beside a bf16 cache, else fp32.
  for (int h = 0; h < a.heads; h++) {
    rotate(rotated, qkv + h * dim, cos, sin, half);
    if constexpr (kType == Dtype::BF16) {
      convert<kType>((uint16_t*)s.at(a.q, t) + h * dim, rotated, dim);
    } else {
      std::memcpy((float*)s.at(a.q, t) + h * dim, rotated, 4 * (size_t)dim);
    }
  }
  const float* keys = qkv + (size_t)a.heads * dim;
  const float* values = keys + (size_t)a.kv_heads * dim;
  int block = s.block_tables[s.request_of[t]][position / kBlock];
  for (int h = 0; h < a.kv_heads; h++) {
    rotate(rotated, keys + h * dim, cos, sin, half);
    write_head<kType>(kv_head_at(s.cache, block, a.layer, h, dim), position % kBlock, dim, rotated, values + h * dim);
  }
}

}  // namespace

void rope_kv(const RopeKvArgs& a, const Step& s, Worker& w) {
  auto token = s.cache.dtype == Dtype::BF16  ? rope_token<Dtype::BF16>
               : s.cache.dtype == Dtype::F16 ? rope_token<Dtype::F16>
                                             : rope_token<Dtype::F32>;
  w.team.split(w.thread, s.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; t++) token(a, s, t);
  });
}

}  // namespace ridgeline::RL_ISA
