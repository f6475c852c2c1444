// A row of logits and its largest tokens, without ever sorting the row: one pass notes the maxima of groups of tokens;
// the k-th largest of them is reached by at least k tokens, and only groups whose maximum reaches it are looked at
// again.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "isa/isa.h"

namespace ridgeline::RL_ISA {

inline constexpr float kLowest = -std::numeric_limits<float>::infinity();
inline constexpr float kLeastFinite = std::numeric_limits<float>::lowest();
inline constexpr int kGroupTokens = 256;  // 16 vectors: a group's maxima are one vector, lane by lane

// Sixteen of n values from i on; those past the end are -inf.
inline F32 load_until(const float* x, int i, int n) {
  if (i + 16 <= n) return load_f(x + i);
  float tail[16];
  std::fill_n(tail, 16, kLowest);
  if (i < n) std::memcpy(tail, x + i, 4 * (size_t)(n - i));
  return load_f(tail);
}

struct Logits {
  const float* x;
  int n;
  float* maxima;  // [groups()][16]: lane j of group g is the largest of tokens 256 g + 16 i + j
  float largest = kLowest;

  int groups() const { return (n + kGroupTokens - 1) / kGroupTokens; }

  // Notes the maxima. Returns whether all values are finite; NaNs are not among the maxima.
  bool scan() {
    F32 top = splat(kLowest), bad[2] = {zero_f(), zero_f()};  // x * 0 is NaN unless x is finite
    float rest = 0;
    for (int g = 0; g < groups(); g++) {
      F32 m[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
      const int first = g * kGroupTokens;
      if (first + kGroupTokens <= n) {
RL_UNROLL
        for (int i = 0; i < 16; i++) {
          const F32 v = load_f(x + first + 16 * i);
          m[i % 4] = max(v, m[i % 4]);
          bad[i % 2] = fma(v, zero_f(), bad[i % 2]);
        }
      } else {
        for (int i = first; i < n; i += 16) m[0] = max(load_until(x, i, n), m[0]);
        for (int i = first; i < n; i++) rest += x[i] * 0.0f;
      }
      const F32 most = max(max(m[0], m[1]), max(m[2], m[3]));
      store_f(maxima + 16 * g, most);
      top = max(most, top);
    }
    largest = reduce_max(top);
    return reduce_add(add(bad[0], bad[1])) + rest == 0;
  }

  // The lowest token of the largest logit.
  int argmax() const {
    int g = 0;
    while (!at_least(load_f(maxima + 16 * g), splat(largest))) g++;
    int token = g * kGroupTokens;
    while (x[token] != largest) token++;
    return token;
  }

  // The largest value known to be reached by at least k tokens; -inf where the maxima are too few to tell.
  float reached_by(int k, float* spare) const {
    int count = groups();
    if (k > 16 * count) return kLowest;
    if (k <= count) {
      for (int g = 0; g < count; g++) spare[g] = reduce_max(load_f(maxima + 16 * g));
    } else {
      count *= 16;
      std::memcpy(spare, maxima, 4 * (size_t)count);
    }
    std::nth_element(spare, spare + k - 1, spare + count, std::greater<float>());
    return spare[k - 1];
  }

  // Tokens that reach `least`, -inf never, in rising order. `values` and `ids` have room for 16 more than n.
  int collect(float least, float* values, int32_t* ids) const {
    const F32 bound = splat(std::max(least, kLeastFinite));
    int count = 0;
    for (int g = 0; g < groups(); g++) {
      if (!at_least(load_f(maxima + 16 * g), bound)) continue;
      const int first = g * kGroupTokens, end = std::min(n, first + kGroupTokens);
      for (int i = first; i < end; i += 16) {
        const F32 v = load_until(x, i, n);
        const uint32_t lanes = at_least(v, bound);
        if (!lanes) continue;
        pack_i(ids + count, lanes, add_i(splat_i(i), load_i(kIota)));
        count += pack_f(values + count, lanes, v);
      }
    }
    return count;
  }

  // The k-th largest value (k below n) and, in `values` and `ids`, the tokens that reach it. `spare`: n floats.
  float collect_top(int k, float* values, int32_t* ids, float* spare, int& count) const {
    count = collect(reached_by(k, spare), values, ids);
    if (count <= k) return count ? *std::min_element(values, values + count) : kLeastFinite;
    std::memcpy(spare, values, 4 * (size_t)count);
    std::nth_element(spare, spare + k - 1, spare + count, std::greater<float>());
    const float kth = spare[k - 1];
    int kept = 0;
    for (int i = 0; i < count; i++)
      if (values[i] >= kth) {
        values[kept] = values[i];
        ids[kept++] = ids[i];
      }
    count = kept;
    return kth;
  }

  alignas(64) static constexpr int32_t kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// Falling logits, ties by the lower token id.
struct Before {
  const float* x;
  bool operator()(int a, int b) const { return x[a] > x[b] || (x[a] == x[b] && a < b); }
};

}  // namespace ridgeline::RL_ISA
