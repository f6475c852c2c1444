// The plan interpreter: holds weights, arena, cache and per-slot state, and runs steps on the team with no
// Python between operators.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "pack.h"
#include "step.h"

namespace ridgeline {

struct ExecutorConfig {
  std::string isa;  // "amx", "avx512", "generic" or "" for the best this machine has
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
  int tokens, requests, sampled, updates;
};

class Executor {
 public:
  explicit Executor(const ExecutorConfig& config);

  // Packs rows into this executor's weight memory. Throws when a row holds NaN or infinity (its index in
  // `bad_row`).
  PackedMatrix pack(const std::vector<const uint8_t*>& rows, Format format, int k, int* bad_row);
  const float* keep_vector(const float* values, size_t count);

  // When an operator needs no barrier behind it, because what follows reads what its own thread has written.
  enum class BarrierFree { Never, OneToken, OneSampled, OneEach };
  void add_op(std::string name, std::function<void(const Step&, Worker&)> run, BarrierFree free = BarrierFree::Never);
  const Kernels& kernels() const { return *kernels_; }
  const ExecutorConfig& config() const { return config_; }
  // Layers whose attention has been added so far: the next linear is followed by this one's.
  int attention_layers = 0;
  void set_logits(Buffer logits) { logits_ = logits; }

  // Runs one step and samples its unflagged rows. Throws std::invalid_argument on a malformed batch, before anything
  // has changed, or, with the block tables updated, when a context reaches past its table.
  void launch(const BatchView& batch);
  // Samples the rows flagged as masked: `masks` holds [flagged][ceil(vocab / 32)] words.
  void finish(const uint32_t* masks, int flagged);

  int sampled() const { return step_.sampled; }
  int num_top() const { return num_top_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<float>& logprobs() const { return logprobs_; }
  const std::vector<int32_t>& top_ids() const { return top_ids_; }
  const std::vector<float>& top_logprobs() const { return top_logprobs_; }
  const float* logits(int row) const { return (const float*)step_.at(logits_, (size_t)row); }

  // Seconds spent in each op (and in sampling, last) since profiling was switched on, on thread 0.
  void set_profiling(bool on);
  const std::vector<double>& op_seconds() const { return op_seconds_; }
  const std::vector<std::string>& op_names() const { return op_names_; }
  Team& team() { return team_; }

 private:
  void check(const BatchView& batch) const;
  void update_block_tables(const BatchView& batch);
  void plan_attention(const BatchView& batch);
  void extend_rope(int positions);
  void list_read_blocks(const BatchView& batch);
  void run_ops();
  void remember_tokens();
  void sample_row(int row, const uint32_t* mask, int thread);

  ExecutorConfig config_;
  const Kernels* kernels_;
  Team team_;
  Region weights_, arena_, cache_, rope_, partials_;
  size_t weights_used_ = 0;
  std::vector<std::unique_ptr<float[]>> vectors_;
  std::vector<Region> scratch_;
  struct Op {
    std::function<void(const Step&, Worker&)> run;
    BarrierFree free;
  };
  bool needs_barrier(const Op& op) const;
  std::vector<Op> ops_;
  std::vector<std::string> op_names_;
  std::vector<double> op_seconds_;
  bool profiling_ = false;
  Buffer logits_;
  Step step_;
  int rope_ready_ = 0, rope_capacity_ = 0, num_top_ = 0;
  std::unique_ptr<std::atomic<int32_t>[]> partial_counts_;
  std::unique_ptr<std::atomic<uint32_t>[]> claims_;
  size_t claims_size_ = 0;
  std::vector<int32_t> block_tables_, last_token_, token_ids_, positions_, request_of_, sample_rows_, slots_;
  std::vector<const int32_t*> tables_;
  std::vector<SamplingRow> sampling_;
  std::vector<int32_t> tokens_, top_ids_;
  std::vector<float> logprobs_, top_logprobs_;
};

const Kernels* select_kernels(const std::string& isa);
// Best bandwidth in bytes/s of `threads` threads reading a buffer of `bytes` several times.
double measure_bandwidth(const Kernels& kernels, size_t bytes, int threads, double seconds);
// Operations/s of int8 dot (kind 0), bf16 dot (1) and fp32 fused multiply-add (2).
double measure_peak(const Kernels& kernels, int kind, int threads);

}  // namespace ridgeline
