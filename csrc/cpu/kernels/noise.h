// The noise of sampling: -log(-log u) for each token, u = (word >> 8 + 1/2) / 2^24, words from Philox 4x32-10 (Salmon
// et al., 2011) keyed by the seed and counted by (position, sample, token / 4, 0). A token's noise depends on nothing
// else, so filters and batching never shift the stream.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// No noise is larger: that of the largest u.
inline constexpr float kMaxGumbel = 17.4f;

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], by the series of 2 atanh(f / (2 + f)).
inline float log1p_series(float f) {
  float s = f / (2.0f + f), q = s * s;
  float p = 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return 2.0f * s + s * q * p;
}

inline float log_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  int e = (int)(b >> 23) - 127;
  b = (b & 0x7fffff) | 0x3f800000;
  float m;
  std::memcpy(&m, &b, 4);
  if (m > 1.41421356f) {
    m *= 0.5f;
    e++;
  }
  return (float)e * 0.69314718f + log1p_series(m - 1.0f);
}

// The noise of a word's upper 24 bits. Above one half u has 25 significant bits, but 1 - u is exact.
inline float gumbel(uint32_t w) {
  float log_u;
  if (w >= 11863283) {  // u > sqrt(1/2)
    log_u = log1p_series(-((float)(0x1000000 - w) - 0.5f) * 0x1p-24f);
  } else if (w >= 0x800000) {  // 2u - 1 is exact
    log_u = log1p_series(1.0f - ((float)(0x1000000 - w) - 0.5f) * 0x1p-23f) - 0.69314718f;
  } else {
    log_u = log_of(((float)w + 0.5f) * 0x1p-24f);
  }
  return -log_of(-log_u);
}

class Noise {
 public:
  Noise(const SamplingRow& row, int position)
      : seed_(row.seed), position_((uint32_t)position), sample_((uint32_t)row.sample_index) {}

  float of(int token) const {
    uint32_t c[4] = {position_, sample_, (uint32_t)token / 4, 0};
    uint32_t k0 = (uint32_t)seed_, k1 = (uint32_t)(seed_ >> 32);
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = (uint64_t)kMul0 * c[0], p1 = (uint64_t)kMul1 * c[2];
      const uint32_t c0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
      c[0] = c0;
      c[1] = (uint32_t)p1;
      c[2] = c2;
      c[3] = (uint32_t)p0;
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    return gumbel(c[token % 4] >> 8);
  }

  // Upper 24 bits of the words of 64 tokens from `first`, a multiple of 4; w[m] holds tokens first + 16 m to + 16.
  void words(int first, I32 (&w)[4]) const {
    // Lane 4 i + m counts quad 4 m + i, so that transposing puts the quads of 16 tokens into one vector.
    alignas(64) static constexpr int32_t kQuads[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    w[0] = splat_i((int32_t)position_);
    w[1] = splat_i((int32_t)sample_);
    w[2] = add_i(splat_i(first / 4), load_i(kQuads));
    w[3] = zero_i();
    uint32_t k0 = (uint32_t)seed_, k1 = (uint32_t)(seed_ >> 32);
RL_UNROLL
    for (int round = 0; round < 10; round++) {
      I32 high0, low0, high1, low1;
      mul_wide(w[0], kMul0, high0, low0);
      mul_wide(w[2], kMul1, high1, low1);
      w[0] = xor_i(xor_i(high1, w[1]), splat_i((int32_t)k0));
      w[2] = xor_i(xor_i(high0, w[3]), splat_i((int32_t)k1));
      w[1] = low1;
      w[3] = low0;
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    transpose4(w);
    for (I32& x : w) x = shift_right<8>(x);
  }

 private:
  static constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  uint64_t seed_;
  uint32_t position_, sample_;
};

}  // namespace ridgeline::RL_ISA
