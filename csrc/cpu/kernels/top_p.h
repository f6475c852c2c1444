// The smallest prefix of tokens, by falling probability and rising id, that holds top_p of all probability (Holtzman
// et al., 2020): found by narrowing down the logit at which it ends, never by sorting many tokens.
#pragma once

#include <cmath>

#include "kernels/logits.h"

namespace ridgeline::RL_ISA {

inline constexpr int kSortAtMost = 512;  // tokens

// Tokens that pass: those above `least`, and of those equal to it the ones up to last_id.
struct Cut {
  float least = kLeastFinite;
  int last_id = std::numeric_limits<int>::max();
};

class TopP {
 public:
  TopP(const Logits& row, float inverse_temperature, float top_p)
      : x_(row.x), largest_(row.largest), inverse_(inverse_temperature), top_p_(top_p) {}

  // Of `count` tokens whose values are `from`; `ids` null: tokens 0 to count. Works in `values` and `tokens`.
  Cut find(const float* from, const int32_t* ids, int count, float* values, int32_t* tokens) {
    if (count > kSortAtMost) {
      float pivots[kPivots], step = 0.5f;  // first by doubling distance from the largest, in units of temperature
      for (float& p : pivots) p = std::max(kLeastFinite, largest_ - step / inverse_), step *= 2;
      pivots[kPivots - 1] = kLeastFinite;
      count = narrow(from, ids, count, pivots, values, tokens);
    } else {
      for (int i = 0; i < count; i++) tokens[i] = ids ? ids[i] : i;
      if (from != values) std::memcpy(values, from, 4 * (size_t)count);
      total_ = 0;
      for (int i = 0; i < count; i++) total_ += mass(values[i]);
    }
    while (count > kSortAtMost) {
      const float low = least_of(values, count), high = -least_of<-1>(values, count);
      if (low == high) break;  // a tie: the lower ids
      float pivots[kPivots];
      for (int j = 0; j < kPivots; j++) pivots[j] = high - (high - low) * (float)(j + 1) / kPivots;
      pivots[kPivots - 1] = low;
      count = narrow(values, tokens, count, pivots, values, tokens);
    }
    return count > kSortAtMost ? end_of_tie(values[0], tokens, count) : end_of_sorted(tokens, count);
  }

 private:
  static constexpr int kPivots = 8;

  double mass(float v) const { return std::exp((double)((v - largest_) * inverse_)); }
  // Of kSign times the values.
  template <int kSign = 1>
  static float least_of(const float* values, int count) {
    F32 most = splat(kLowest);
    for (int i = 0; i < count; i += 16) {
      const F32 v = load_f(values + std::max(0, std::min(i, count - 16)));
      most = max(kSign > 0 ? sub(zero_f(), v) : v, most);
    }
    return -reduce_max(most);
  }
  bool is_enough(double mass) const { return mass >= top_p_ * total_; }

  // Keeps the tokens between the two neighbouring pivots (falling) where the prefix ends, and adds what lies above
  // to above_. The first call also finds the total. The last pivot is the least value, so that some are always kept.
  int narrow(const float* from, const int32_t* ids, int count, const float (&pivots)[kPivots], float* values,
             int32_t* tokens) {
    double reached[kPivots + 1];
    sum(from, count, pivots, reached);
    if (total_ < 0) total_ = reached[kPivots];
    int j = 0;
    while (j + 1 < kPivots && !is_enough(above_ + reached[j])) j++;
    if (j > 0) above_ += reached[j - 1];
    const F32 low = splat(pivots[j]);
    const F32 high = splat(j > 0 ? pivots[j - 1] : std::numeric_limits<float>::infinity());
    int kept = 0;
    for (int i = 0; i < count; i += 16) {
      const F32 v = load_until(from, i, count);
      const I32 t = ids ? load_i(ids + i) : add_i(splat_i(i), load_i(Logits::kIota));
      const uint32_t lanes = at_least(v, low) & below(v, high);
      if (!lanes) continue;
      pack_i(tokens + kept, lanes, t);
      kept += pack_f(values + kept, lanes, v);
    }
    return kept;
  }

  // Sums of exp over the values that reach each pivot, and over all of them.
  void sum(const float* from, int count, const float (&pivots)[kPivots], double (&reached)[kPivots + 1]) const {
    F32 at[kPivots];
    for (int j = 0; j < kPivots; j++) at[j] = splat(pivots[j]);
    std::fill_n(reached, kPivots + 1, 0.0);
    for (int begin = 0; begin < count; begin += 4096) {  // short fp32 sums, added up in double
      F32 sums[kPivots + 1];
      for (F32& s : sums) s = zero_f();
      const int end = std::min(count, begin + 4096);
      for (int i = begin; i < end; i += 16) {
        const F32 v = load_until(from, i, count);
        const F32 e = exp(mul(sub(v, splat(largest_)), splat(inverse_)));
RL_UNROLL
        for (int j = 0; j < kPivots; j++) sums[j] = add_where(at_least(v, at[j]), sums[j], e);
        sums[kPivots] = add(sums[kPivots], e);
      }
      for (int j = 0; j <= kPivots; j++) reached[j] += reduce_add(sums[j]);
    }
  }

  // Equal values, tokens rising.
  Cut end_of_tie(float value, const int32_t* tokens, int count) {
    const double each = mass(value);
    int i = 0;
    for (above_ += each; i + 1 < count && !is_enough(above_); i++) above_ += each;
    return {value, tokens[i]};
  }

  Cut end_of_sorted(int32_t* tokens, int count) {
    std::sort(tokens, tokens + count, Before{x_});
    int i = 0;
    for (above_ += mass(x_[tokens[0]]); i + 1 < count && !is_enough(above_); i++) above_ += mass(x_[tokens[i + 1]]);
    return {x_[tokens[i]], tokens[i]};
  }

  const float* x_;
  float largest_, inverse_;
  double top_p_, total_ = -1, above_ = 0;
};

}  // namespace ridgeline::RL_ISA
