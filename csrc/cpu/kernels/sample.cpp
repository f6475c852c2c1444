// Sampling one row of logits. Filters in vLLM's order (top-k, top-p, min-p) on probabilities after
// temperature, then the Gumbel maximum over the survivors: argmax of logit / temperature - log(-log u),
// u from Philox 4x32-10 (Salmon et al., 2011) keyed by the seed and counted by (position, sample, token).
// A token's random number depends on nothing else, so filters and batching never shift the stream.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "kernels/table.h"

namespace ridgeline::RL_ISA {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// -log(-log u) for the largest u: no token further than this below the best score can win.
constexpr float kMaxGumbel = 17.4f;

void philox(uint64_t seed, uint32_t (&counter)[4]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    uint32_t c0 = (uint32_t)(p1 >> 32) ^ counter[1] ^ k0, c2 = (uint32_t)(p0 >> 32) ^ counter[3] ^ k1;
    counter[0] = c0;
    counter[1] = (uint32_t)p1;
    counter[2] = c2;
    counter[3] = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], by the series of 2 atanh(f / (2 + f)).
float log1p_series(float f) {
  float s = f / (2.0f + f), q = s * s;
  float p = 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return 2.0f * s + s * q * p;
}

float log_of(float x) {
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

// -log(-log u) with u = (w + 1/2) / 2^24. Above one half u has 25 significant bits, but 1 - u is exact.
float gumbel(uint32_t w) {
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

float gumbel_of(const SampleArgs& a, int token) {
  uint32_t counter[4] = {(uint32_t)a.position, (uint32_t)a.row->sample_index, (uint32_t)token / 4, 0};
  philox(a.row->seed, counter);
  return gumbel(counter[token % 4] >> 8);
}

float max_of(const float* x, int n) {
  F32 top = splat(kLowest);
  int i = 0;
  for (; i + 16 <= n; i += 16) top = max(top, load_f(x + i));
  float m = reduce_max(top);
  for (; i < n; i++) m = std::max(m, x[i]);
  return m;
}

// False when any of n values is NaN or an infinity.
bool all_finite(const float* x, int n) {
  F32 zero = zero_f();
  int i = 0;
  float rest = 0;
  for (; i + 16 <= n; i += 16) zero = fma(load_f(x + i), zero_f(), zero);
  for (; i < n; i++) rest += x[i] * 0.0f;
  return reduce_add(zero) + rest == 0;
}

double sum_of_exp(const float* x, int n, float base) {
  double total = 0;
  for (int i = 0; i < n; i += 4096) {  // short fp32 sums, added up in double
    F32 sum = zero_f();
    int end = std::min(n, i + 4096), j = i;
    for (; j + 16 <= end; j += 16) sum = add(sum, exp(sub(load_f(x + j), splat(base))));
    total += reduce_add(sum);
    for (; j < end; j++) total += std::exp((double)x[j] - base);
  }
  return total;
}

// Descending by value, ties by the lower token id.
struct Before {
  const float* z;
  bool operator()(int a, int b) const { return z[a] > z[b] || (z[a] == z[b] && a < b); }
};

void report_logprobs(const SampleArgs& a, int token, int32_t* ids) {
  double log_sum = max_of(a.logits, a.vocab);
  log_sum += std::log(sum_of_exp(a.logits, a.vocab, (float)log_sum));
  *a.logprob = (float)(a.logits[token] - log_sum);
  int k = std::min(std::min(a.num_top, a.row->num_logprobs), a.vocab);
  if (k <= 0) return;
  for (int i = 0; i < a.vocab; i++) ids[i] = i;
  std::partial_sort(ids, ids + k, ids + a.vocab, Before{a.logits});
  for (int i = 0; i < k; i++) {
    a.top_ids[i] = ids[i];
    a.top_logprobs[i] = (float)(a.logits[ids[i]] - log_sum);
  }
}

// Cuts the survivors ids[0, count) down to the smallest prefix of the sorted order that holds top_p.
int keep_top_p(const float* z, int32_t* ids, int count, float top_p) {
  double total = 0;
  for (int i = 0; i < count; i++) total += std::exp((double)z[ids[i]]);
  double seen = 0;
  for (int done = 0, want = 64; done < count; want *= 8) {
    int upto = std::min(count, want);
    if (upto < count) std::nth_element(ids + done, ids + upto, ids + count, Before{z});
    std::sort(ids + done, ids + upto, Before{z});
    for (; done < upto; done++) {
      seen += std::exp((double)z[ids[done]]);
      if (seen >= top_p * total) return done + 1;
    }
  }
  return count;
}

int draw(const SampleArgs& a, const float* logits, float* z, int32_t* ids) {
  const SamplingRow& row = *a.row;
  // Relative to the largest, so that a small temperature neither overflows nor drowns the noise.
  const float largest = max_of(logits, a.vocab);
  for (int i = 0; i < a.vocab; i++) z[i] = (logits[i] - largest) / row.temperature;
  float least = kLowest;
  if (row.top_k > 0 && row.top_k < a.vocab) {
    float* sorted = (float*)ids;
    std::memcpy(sorted, z, 4 * (size_t)a.vocab);
    std::nth_element(sorted, sorted + row.top_k - 1, sorted + a.vocab, std::greater<float>());
    least = sorted[row.top_k - 1];
  }
  int count = 0, best = 0;
  for (int i = 0; i < a.vocab; i++) {
    ids[count] = i;
    count += z[i] >= least && z[i] > kLowest;
  }
  if (row.top_p < 1) count = keep_top_p(z, ids, count, row.top_p);
  float floor = row.min_p > 0 ? (float)std::log((double)row.min_p) : kLowest, score = kLowest;
  for (int i = 0; i < count; i++)
    if (z[ids[i]] == 0) best = ids[i], score = gumbel_of(a, best);
  for (int i = 0; i < count; i++) {
    int token = ids[i];
    if (z[token] < floor || z[token] + kMaxGumbel < score) continue;
    float s = z[token] + gumbel_of(a, token);
    if (s > score || (s == score && token < best)) best = token, score = s;
  }
  return best;
}

}  // namespace

void sample(const SampleArgs& a) {
  float* z = (float*)a.scratch;
  float* masked = z + a.vocab;
  int32_t* ids = (int32_t*)(masked + a.vocab);
  const float* logits = a.logits;
  *a.token = -1;  // what NaN logits give
  *a.logprob = std::numeric_limits<float>::quiet_NaN();
  for (int i = 0; i < a.num_top; i++) {
    a.top_ids[i] = -1;
    a.top_logprobs[i] = std::numeric_limits<float>::quiet_NaN();
  }
  if (!all_finite(a.logits, a.vocab)) return;
  if (a.row->target > 0) {
    *a.token = a.row->target - 1;
    return report_logprobs(a, *a.token, ids);
  }
  a.changes->clear();
  if (a.slot) a.slot->adjust(a.logits, a.position, *a.changes);
  if (a.mask) {
    for (int i = 0; i < a.vocab; i++) masked[i] = a.mask[i / 32] >> (i % 32) & 1 ? a.logits[i] : kLowest;
    logits = masked;
  }
  const float top = max_of(logits, a.vocab);
  if (top > kLowest) {  // else nothing may be sampled
    int token = 0;
    if (a.row->temperature >= std::numeric_limits<float>::min()) {  // below: as good as greedy
      token = draw(a, logits, z, ids);
    } else {
      while (logits[token] != top) token++;
    }
    *a.token = token;
  }
  restore(a.logits, *a.changes);
  if (*a.token >= 0 && a.row->num_logprobs >= 0) report_logprobs(a, *a.token, ids);
}

}  // namespace ridgeline::RL_ISA
