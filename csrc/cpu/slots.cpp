#include "slots.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace ridgeline {
namespace {

void need(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

void need_tokens(const std::vector<int32_t>& tokens, int vocab, const char* what) {
  for (int32_t t : tokens) need(t >= 0 && t < vocab, what);
}

}  // namespace

bool SlotStart::asks_nothing() const {
  return repetition == 1 && presence == 0 && frequency == 0 && bias_ids.empty() &&
         (min_tokens == 0 || min_tokens_ids.empty()) && bad_words.empty();
}

void SlotStart::check(int num_slots, int vocab) const {
  need(slot >= 0 && slot < num_slots, "slot of a slot start out of range");
  need(prompt_len >= 0 && min_tokens >= 0, "prompt_len and min_tokens of a slot start must be at least 0");
  need(std::isfinite(repetition) && repetition > 0, "repetition_penalty must be a finite number above 0");
  need(std::isfinite(presence) && std::isfinite(frequency), "presence and frequency penalties must be finite");
  need(bias_ids.size() == bias.size(), "a slot start needs one bias for each of its bias_ids");
  for (float b : bias) need(std::isfinite(b), "a logit bias must be finite");
  need_tokens(tokens, vocab, "a slot start's tokens must be in the vocabulary");
  need_tokens(bias_ids, vocab, "bias_ids must be in the vocabulary");
  need_tokens(min_tokens_ids, vocab, "min_tokens_ids must be in the vocabulary");
  for (const auto& word : bad_words) {
    need(!word.empty(), "a bad word needs a token");
    need_tokens(word, vocab, "bad words must be in the vocabulary");
  }
}

SlotState::SlotState(const SlotStart& start)
    : asked_(start),
      log_(start.tokens),
      penalizes_(start.repetition != 1 || start.presence != 0 || start.frequency != 0) {}

void SlotState::feed(int position, const int32_t* tokens, int count) {
  if (counted_ > position) count_to(position);
  log_.resize((size_t)position);
  log_.insert(log_.end(), tokens, tokens + count);
}

// Takes one position into the counts, or out of them again.
void SlotState::count(int position, int change) {
  const bool output = position >= asked_.prompt_len;
  if (!output && asked_.repetition == 1) return;  // only repetition looks at the prompt
  const int32_t token = log_[(size_t)position];
  auto [at, is_new] = index_.try_emplace(token, (int32_t)counts_.size());
  if (is_new) counts_.push_back({token, 0, 0});
  Count& seen = counts_[(size_t)at->second];
  (output ? seen.output : seen.prompt) += change;
}

void SlotState::count_to(int length) {
  while (counted_ < length) count(counted_++, 1);
  while (counted_ > length) count(--counted_, -1);
}

float SlotState::penalized(float logit, const Count& seen) const {
  logit = logit > 0 ? logit / asked_.repetition : logit * asked_.repetition;
  logit -= asked_.frequency * (float)seen.output;
  if (seen.output > 0) logit -= asked_.presence;
  return std::min(logit, std::numeric_limits<float>::max());
}

// Whether the first `length` tokens of the log, prompt or output, end with all of a word but its last token.
bool SlotState::completes(const std::vector<int32_t>& word, int length) const {
  const size_t before = word.size() - 1;
  return (size_t)length >= before && std::equal(word.begin(), word.end() - 1, log_.begin() + length - (long)before);
}

void SlotState::adjust(float* logits, int length, std::vector<ChangedLogit>& changes) {
  auto change = [&](int32_t token, float to) {
    changes.push_back({token, logits[token]});
    logits[token] = to;
  };
  constexpr float kBanned = -std::numeric_limits<float>::infinity();
  for (const auto& word : asked_.bad_words)
    if (completes(word, length)) change(word.back(), kBanned);
  if (std::max(0, length - asked_.prompt_len) < asked_.min_tokens)
    for (int32_t token : asked_.min_tokens_ids) change(token, kBanned);
  for (size_t i = 0; i < asked_.bias_ids.size(); i++) {
    const int32_t token = asked_.bias_ids[i];
    change(token, std::min(logits[token] + asked_.bias[i], std::numeric_limits<float>::max()));
  }
  if (!penalizes_) return;
  count_to(length);
  for (const Count& seen : counts_)
    if (seen.prompt + seen.output > 0) change(seen.token, penalized(logits[seen.token], seen));
}

void restore(float* logits, const std::vector<ChangedLogit>& changes) {
  for (size_t i = changes.size(); i-- > 0;) logits[changes[i].token] = changes[i].was;
}

}  // namespace ridgeline
