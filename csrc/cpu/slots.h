// Sampling state of a slot: the log of its tokens by position, and what its owner asks of the logits beyond a row of
// sampling parameters.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace ridgeline {

// core/types.py SlotStart: what a slot's new owner brings.
struct SlotStart {
  int32_t slot = 0, prompt_len = 0, min_tokens = 0;
  float repetition = 1, presence = 0, frequency = 0;
  std::vector<int32_t> tokens;  // in the cache already: positions 0 to tokens.size()
  std::vector<int32_t> bias_ids, min_tokens_ids;
  std::vector<float> bias;
  std::vector<std::vector<int32_t>> bad_words;

  bool asks_nothing() const;
  // Throws std::invalid_argument for what cannot work with so many slots and tokens of vocabulary.
  void check(int num_slots, int vocab) const;
};

// A logit changed in place, with what it was.
struct ChangedLogit {
  int32_t token;
  float was;
};

class SlotState {
 public:
  explicit SlotState(const SlotStart& start);

  // Tokens of the log: those at positions 0 to length().
  int length() const { return (int)log_.size(); }
  // Records tokens from `position` (at most length()) on and forgets what stood there and after: rejected drafts.
  void feed(int position, const int32_t* tokens, int count);
  // Changes the logits of the token that follows the first `length` of the log, and notes what it changed. In the
  // order of vLLM (v1/sample/sampler.py): bad words and, below min_tokens, min_tokens_ids become -inf; logit bias is
  // added; then the penalties for repetition (Keskar et al., 2019), frequency and presence, in fp32.
  void adjust(float* logits, int length, std::vector<ChangedLogit>& changes);

 private:
  struct Count {
    int32_t token, prompt, output;
  };
  void count_to(int length);
  void count(int position, int change);
  float penalized(float logit, const Count& seen) const;
  bool completes(const std::vector<int32_t>& word, int length) const;

  SlotStart asked_;
  std::vector<int32_t> log_;
  bool penalizes_ = false;
  int counted_ = 0;  // positions that counts_ covers
  std::vector<Count> counts_;
  std::unordered_map<int32_t, int32_t> index_;  // of each token in counts_
};

// Puts changed logits back, whatever the order in which they were changed.
void restore(float* logits, const std::vector<ChangedLogit>& changes);

}  // namespace ridgeline
