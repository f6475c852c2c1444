// Storing a vector pair of fp32 results in the activation type the next operator multiplies.
#pragma once

#include <algorithm>
#include <limits>

#include "isa/isa.h"
#include "packed.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// Quantizes 32 values (a then b) into group g of a q8 row: scale = max|x| / 127, codes rounded to even.
inline void store_q8_group(uint8_t* row, int k, int g, F32 a, F32 b) {
  float amax = reduce_max(max(abs(a), abs(b)));
  float scale = amax / 127.0f;
  // A maximum too small to invert would give infinity, and infinity times 0 is no code.
  F32 inverse = splat(amax > 0 ? std::min(127.0f / amax, std::numeric_limits<float>::max()) : 0.0f);
  I32 qa = to_i(mul(a, inverse)), qb = to_i(mul(b, inverse));
  store_i8(row + kGroup * g, qa);
  store_i8(row + kGroup * g + 16, qb);
  int32_t sum = reduce_add_i(add_i(qa, qb));
  ((float*)(row + q8_scales_at(k)))[g] = scale;
  ((float*)(row + q8_scaled_sums_at(k)))[g] = scale * (float)sum;
  ((int32_t*)(row + q8_sums_at(k)))[g] = sum;
}

// Stores columns [16 * i, 16 * i + 32) of a row of k values as `dtype`; i counts vectors and is even.
inline void store_pair(Dtype dtype, uint8_t* row, int k, int i, F32 a, F32 b) {
  if (dtype == Dtype::Q8) {
    store_q8_group(row, k, i / 2, a, b);
  } else if (dtype == Dtype::BF16) {
    store_bf16(row + 32 * i, a);
    store_bf16(row + 32 * i + 32, b);
  } else {
    store_f(row + 64 * i, a);
    store_f(row + 64 * i + 64, b);
  }
}

// The same for a whole row of fp32; k need not be a multiple of 32 unless dtype is Q8.
inline void store_row(Dtype dtype, uint8_t* row, int k, const float* x) {
  int i = 0;
  for (; i + 32 <= k; i += 32) store_pair(dtype, row, k, i / 16, load_f(x + i), load_f(x + i + 16));
  if (i == k) return;
  float tail[32] = {};
  for (int j = i; j < k; j++) tail[j - i] = x[j];
  alignas(64) uint8_t stored[128];
  store_pair(dtype, stored, 32, 0, load_f(tail), load_f(tail + 16));
  size_t width = dtype == Dtype::BF16 ? 2 : 4;
  __builtin_memcpy(row + width * i, stored, width * (k - i));
}

}  // namespace ridgeline::RL_ISA
