// Sampling one row of logits. What a slot asks for (slots.h) and the mask come first; then the filters in vLLM's order
// (top-k, top-p, min-p) on probabilities after temperature; then the Gumbel maximum over the survivors: argmax of
// logit / temperature - log(-log u), with the noise of noise.h.
#include <cmath>

#include "kernels/noise.h"
#include "kernels/table.h"
#include "kernels/top_p.h"

namespace ridgeline::RL_ISA {
namespace {

double sum_of_exp(const float* x, int n, float base) {
  double total = 0;
  for (int i = 0; i < n; i += 4096) {  // short fp32 sums, added up in double
    F32 sums[2] = {zero_f(), zero_f()};
    int end = std::min(n, i + 4096), j = i;
    for (; j + 32 <= end; j += 32)
      for (int s = 0; s < 2; s++) sums[s] = add(sums[s], exp(sub(load_f(x + j + 16 * s), splat(base))));
    total += reduce_add(add(sums[0], sums[1]));
    for (; j < end; j++) total += std::exp((double)x[j] - base);
  }
  return total;
}

// This thread's memory, in parts for n tokens: see sample_scratch_bytes.
struct Scratch {
  float *masked, *values, *spare, *maxima;
  int32_t* ids;

  Scratch(uint8_t* at, int n) {
    const size_t room = (size_t)n + 16;
    masked = (float*)at;
    values = masked + room;
    spare = values + room;
    ids = (int32_t*)(spare + room);
    maxima = (float*)(ids + room);
  }
};

// Of the raw logits, whatever was sampled from.
void report_logprobs(const SampleArgs& a, const Logits& row, const Scratch& s, int token) {
  const double log_sum = row.largest + std::log(sum_of_exp(row.x, row.n, row.largest));
  *a.logprob = (float)(row.x[token] - log_sum);
  const int k = std::min(std::min(a.num_top, a.row->num_logprobs), row.n);
  if (k <= 0) return;
  int count;
  const float kth = row.collect_top(k, s.values, s.ids, s.spare, count);
  // Of those equal to the k-th the lowest ids: drop the rest before sorting.
  int surplus = count - k;
  for (int i = count - 1; surplus > 0 && i >= 0; i--)
    if (s.values[i] == kth) s.ids[i] = -1, surplus--;
  const int kept = (int)(std::remove(s.ids, s.ids + count, -1) - s.ids);
  std::sort(s.ids, s.ids + kept, Before{row.x});
  for (int i = 0; i < k; i++) {
    a.top_ids[i] = s.ids[i];
    a.top_logprobs[i] = (float)(row.x[s.ids[i]] - log_sum);
  }
}

// The Gumbel maximum, over tokens offered in any order.
class Race {
 public:
  Race(const SampleArgs& a, const Logits& row)
      : noise_(*a.row, a.position), largest_(row.largest), inverse_(1.0f / a.row->temperature) {
    floor_ = a.row->min_p > 0 ? (float)std::log((double)a.row->min_p) : kLowest;
    best_ = row.argmax();  // survives every filter
    score_ = noise_.of(best_);
  }

  float inverse_temperature() const { return inverse_; }
  int winner() const { return best_; }

  void offer(const float* values, const int32_t* ids, int count, const Cut& cut) {
    for (int i = 0; i < count; i++) {
      if (values[i] < cut.least || (values[i] == cut.least && ids[i] > cut.last_id)) continue;
      const float z = (values[i] - largest_) * inverse_;
      if (z >= bound()) take(ids[i], z + noise_.of(ids[i]));
    }
  }

  void offer_all(const Logits& row, const Cut& cut) {
    for (int g = 0; g < row.groups(); g++) {
      const F32 most = load_f(row.maxima + 16 * g);
      if (!(at_least(most, splat(cut.least)) & at_least(scaled(most), splat(bound())))) continue;
      const int first = g * kGroupTokens, end = std::min(row.n, first + kGroupTokens);
      for (int i = first; i < end; i += 64) offer_64(row, i, cut);
    }
  }

 private:
  // Relative to the largest, so that a small temperature neither overflows nor drowns the noise.
  F32 scaled(F32 v) const { return mul(sub(v, splat(largest_)), splat(inverse_)); }
  // What a token needs before noise to be worth a look.
  float bound() const { return std::max(floor_, score_ - kMaxGumbel); }

  void take(int token, float score) {
    if (score > score_ || (score == score_ && token < best_)) best_ = token, score_ = score;
  }

  void offer_64(const Logits& row, int first, const Cut& cut) {
    F32 v[4], z[4];
    uint32_t lanes[4], any = 0;
    for (int m = 0; m < 4; m++) {
      v[m] = load_until(row.x, first + 16 * m, row.n);
      z[m] = scaled(v[m]);
      any |= lanes[m] = at_least(v[m], splat(cut.least)) & at_least(z[m], splat(bound()));
    }
    if (!any) return;
    I32 words[4];
    noise_.words(first, words);
    for (int m = 0; m < 4; m++)
      if (lanes[m]) offer_16(v[m], z[m], words[m], lanes[m], first + 16 * m, cut);
  }

  // As -log u >= 1 - u, a token can only win where 1 - u < exp(z - score): one exp instead of two logarithms. The
  // margin is for rounding; whoever passes is computed exactly.
  void offer_16(F32 v, F32 z, I32 words, uint32_t lanes, int first, const Cut& cut) {
    const F32 chance = fma(exp(sub(z, splat(score_))), splat(0x1p24f * 1.0001f), splat(1.0f));
    lanes &= at_least(chance, to_f(sub_i(splat_i(0x1000000), words)));
    if (!lanes) return;
    float vs[16], zs[16];
    uint32_t ws[16];
    store_f(vs, v);
    store_f(zs, z);
    store_i(ws, words);
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      if (vs[i] == cut.least && first + i > cut.last_id) continue;
      if (zs[i] >= bound()) take(first + i, zs[i] + gumbel(ws[i]));
    }
  }

  Noise noise_;
  float largest_, inverse_, floor_, score_;
  int best_;
};

int draw(const SampleArgs& a, const Logits& row, const Scratch& s) {
  Race race(a, row);
  Cut cut;
  int count = row.n;
  const bool top_k = a.row->top_k > 0 && a.row->top_k < row.n;
  if (top_k) cut.least = row.collect_top(a.row->top_k, s.values, s.ids, s.spare, count);
  if (a.row->top_p < 1) {
    TopP top_p(row, race.inverse_temperature(), a.row->top_p);
    cut = top_p.find(top_k ? s.values : row.x, top_k ? s.ids : nullptr, count, s.values, s.ids);
  }
  if (count <= kSortAtMost) {
    // top_p has sorted the ids but not the values beside them.
    for (int i = 0; i < count; i++) s.values[i] = row.x[top_k ? s.ids[i] : s.ids[i] = i];
    race.offer(s.values, s.ids, count, cut);
  } else {
    race.offer_all(row, cut);
  }
  return race.winner();
}

// The logits with the tokens that a mask forbids at -inf.
void apply_mask(const float* x, const uint32_t* mask, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16)
    store_f(out + i, blend(mask[i / 32] >> (i % 32) & 0xffff, load_f(x + i), splat(kLowest)));
  for (; i < n; i++) out[i] = mask[i / 32] >> (i % 32) & 1 ? x[i] : kLowest;
}

// -1 where nothing may be sampled. The maxima are those of `row` afterwards.
int choose(const SampleArgs& a, Logits row, const Scratch& s) {
  if (a.slot) a.slot->adjust(a.logits, a.position, *a.changes);
  if (a.mask) {
    apply_mask(a.logits, a.mask, a.vocab, s.masked);
    row.x = s.masked;
  }
  if (a.slot || a.mask) row.scan();
  if (row.largest == kLowest) return -1;
  // A temperature below the smallest normal number is as good as greedy.
  return a.row->temperature >= std::numeric_limits<float>::min() ? draw(a, row, s) : row.argmax();
}

}  // namespace

void sample(const SampleArgs& a) {
  const Scratch s(a.scratch, a.vocab);
  *a.token = -1;  // what NaN logits give
  *a.logprob = std::numeric_limits<float>::quiet_NaN();
  for (int i = 0; i < a.num_top; i++) {
    a.top_ids[i] = -1;
    a.top_logprobs[i] = std::numeric_limits<float>::quiet_NaN();
  }
  Logits row{a.logits, a.vocab, s.maxima};
  if (!row.scan()) return;
  if (a.row->target > 0) {
    *a.token = a.row->target - 1;
    return report_logprobs(a, row, s, *a.token);
  }
  a.changes->clear();
  *a.token = choose(a, row, s);
  restore(a.logits, *a.changes);
  if (*a.token < 0 || a.row->num_logprobs < 0) return;
  if (a.slot || a.mask) row.scan();
  report_logprobs(a, row, s, *a.token);
}

}  // namespace ridgeline::RL_ISA
