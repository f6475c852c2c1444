// The plan interpreter: holds weights, arena, cache and per-slot state, and runs steps on the team with no
// Python between operators.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "pack.h"
#include "profile.h"
#include "slots.h"
#include "step.h"

namespace ridgeline {

struct ExecutorConfig {
  std::string isa;  // "amx", "avx512", "avx2", "generic" or "" for the best this machine has
  int threads = 0;  // 0: all this process may use
  int max_tokens = 0, max_sampled = 0, num_slots = 0;
  int max_blocks_per_slot = 0, num_blocks = 0;
  int layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  Dtype kv_dtype = Dtype::BF16;
  size_t arena_bytes = 0;
  size_t weight_bytes = 0;            // of all packed matrices together
  std::vector<double> rope_frequency;  // [head_dim / 2] angle per position
};

// A step's inputs as flat arrays (core/types.py Batch).
struct BatchView {
  const int32_t *token_ids, *positions, *slots, *query_starts, *context_lens, *sample_rows;
  const SamplingRow* sampling;
  const int32_t* block_updates;  // [updates][3]
  const int32_t* block_copies;   // [copies][2]
  const std::vector<SlotStart>* slot_starts;
  int tokens, requests, sampled, updates, copies;
};

class Executor {
 public:
  explicit Executor(const ExecutorConfig& config);
  ~Executor();

  // Packs rows of a file into this executor's weight memory; `tiles` as in packed_format(). A row that holds NaN or
  // infinity is left in `bad_row`.
  PackedMatrix pack(const std::vector<const uint8_t*>& rows, Format file, int k, bool tiles, int* bad_row);
  const float* keep_vector(const float* values, size_t count);

  // When an operator needs no barrier behind it, because what follows reads what its own thread has written.
  enum class BarrierFree { Never, OneToken, OneSampled, OneEach };
  void add_op(std::string name, std::function<void(const Step&, Worker&)> run, BarrierFree free = BarrierFree::Never);
  const Kernels& kernels() const { return *kernels_; }
  const ExecutorConfig& config() const { return config_; }
  // Layers whose attention has been added so far: the next linear is followed by this one's.
  int attention_layers = 0;
  // A linear's arguments, kept and linked to those of the one before.
  const LinearArgs& keep_linear(const LinearArgs& a);
  void set_logits(Buffer logits) { logits_ = logits; }
  // Width of the final norm's rows, and the first operator that only serves the logits: left out where no row
  // wants any.
  int hidden_size = 0;
  void set_head(size_t first_op) { head_ = first_op; }

  // Runs one step and samples its unflagged rows. Throws std::invalid_argument on a malformed batch, before anything
  // has changed, or, with the block tables updated, when a context reaches past its table.
  void launch(const BatchView& batch);
  // Samples the rows flagged as masked (`masks` holds [flagged][ceil(vocab / 32)] words) and settles which rows stand.
  void finish(const uint32_t* masks, int flagged);

  int sampled() const { return step_.sampled; }
  int num_top() const { return num_top_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<float>& logprobs() const { return logprobs_; }
  const std::vector<int32_t>& top_ids() const { return top_ids_; }
  const std::vector<float>& top_logprobs() const { return top_logprobs_; }
  const std::vector<int32_t>& accepted() const { return accepted_; }
  int pooled() const { return pooled_; }
  const std::vector<float>& hidden() const { return hidden_; }
  // Null where no row of the step wanted logits.
  const float* logits(int row) const { return wants_logits_ ? logits_at(row) : nullptr; }

  // Whether steps are counted in the profile; `reset_profile` forgets those that were.
  void set_profiling(bool on);
  void reset_profile() { profile_.reset(ops_.size(), team_.size()); }
  const Profile& profile() const { return profile_; }
  const std::vector<std::string>& op_names() const { return op_names_; }
  Team& team() { return team_; }

 private:
  void check(const BatchView& batch) const;
  void check_requests(const BatchView& batch) const;
  void check_rows(const BatchView& batch) const;
  void check_blocks(const BatchView& batch) const;
  void check_slots(const BatchView& batch) const;
  float* logits_at(int row) const { return (float*)step_.at(logits_, (size_t)row); }
  void update_block_tables(const BatchView& batch);
  void plan_attention(const BatchView& batch);
  void extend_rope(int positions);
  void list_read_blocks(const BatchView& batch);
  void take_tokens(const BatchView& batch);
  void plan_sampling(const BatchView& batch);
  void copy_blocks(int thread);
  void run_ops();
  void settle();
  void sample_row(int row, const uint32_t* mask, int thread);

  ExecutorConfig config_;
  const Kernels* kernels_;
  Region weights_, arena_, cache_, rope_, partials_;
  std::unique_ptr<PagesAhead> cache_ahead_;  // behind the cache, which its thread touches
  Team team_;
  size_t weights_used_ = 0;
  std::vector<std::unique_ptr<float[]>> vectors_;
  std::vector<std::unique_ptr<LinearArgs>> linears_;
  std::vector<Region> scratch_;
  struct Op {
    std::function<void(const Step&, Worker&)> run;
    BarrierFree free;
  };
  bool needs_barrier(const Op& op) const;
  std::vector<Op> ops_;
  std::vector<std::string> op_names_;
  Profile profile_;
  Buffer logits_;
  Step step_;
  int rope_ready_ = 0, rope_capacity_ = 0, num_top_ = 0, pooled_ = 0;
  size_t head_ = SIZE_MAX;
  bool wants_logits_ = false;
  std::unique_ptr<std::atomic<int32_t>[]> partial_counts_;
  std::unique_ptr<std::atomic<uint32_t>[]> claims_;
  size_t claims_size_ = 0;
  std::vector<int32_t> block_tables_, last_token_, token_ids_, positions_, request_of_, sample_rows_, slots_;
  std::vector<const int32_t*> tables_;
  std::vector<SamplingRow> sampling_;
  std::vector<int32_t> block_copies_, query_ends_;
  // Per slot, null for those that ask for nothing beyond a row of sampling parameters.
  std::vector<std::unique_ptr<SlotState>> slot_states_;
  std::vector<std::vector<ChangedLogit>> changes_;  // per thread
  // Rows sampled one after another by one thread: those of a slot with state, else a row alone. [tasks + 1] starts.
  std::vector<int32_t> sampling_tasks_;
  std::vector<int32_t> tokens_, accepted_, top_ids_, hidden_rows_;
  std::vector<float> logprobs_, top_logprobs_, hidden_;
};

const Kernels* select_kernels(const std::string& isa);
// Best bandwidth in bytes/s of `threads` threads reading a buffer of `bytes` several times.
double measure_bandwidth(const Kernels& kernels, size_t bytes, int threads, double seconds);
// Operations/s of int8 dot (kind 0), bf16 dot (1) and fp32 fused multiply-add (2).
double measure_peak(const Kernels& kernels, int kind, int threads);

}  // namespace ridgeline
