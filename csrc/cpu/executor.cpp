#include "executor.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace ridgeline {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

constexpr int kRopeStep = 256;        // positions added to the rotary table at a time
constexpr size_t kBlocksAhead = 32;  // least kept ready: a prompt of 512 tokens

}  // namespace

const Kernels* select_kernels(const std::string& isa) {
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (isa.empty() || isa == k->name) return k;
    names += (names.empty() ? "'" : ", '") + std::string(k->name) + "'";
  }
  const std::pair<const char*, const char*> needs[] = {
      {"amx", "AMX (TILE, INT8, BF16)"}, {"avx512", "AVX-512 VNNI and BF16"}, {"avx2", "AVX2, FMA, F16C and BMI2"}};
  for (const auto& [name, what] : needs)
    if (isa == name) refuse("this processor or this build has no " + std::string(what) + ": use isa=" + names);
  refuse("unknown instruction set '" + isa + "': use " + names);
}

Executor::Executor(const ExecutorConfig& config)
    : config_(config),
      kernels_(select_kernels(config.isa)),
      weights_(config.weight_bytes),
      arena_(config.arena_bytes),
      team_(config.threads > 0 ? config.threads : available_threads()) {
  KvCache& cache = step_.cache;
  cache.dtype = config.kv_dtype;
  cache.keys_bytes = kBlock * kv_row_bytes(config.kv_dtype, config.head_dim);
  cache.layer_bytes = (size_t)config.kv_heads * 2 * cache.keys_bytes;
  cache.block_bytes = cache.layer_bytes * config.layers;
  cache_ = Region(cache.block_bytes * (size_t)config.num_blocks);
  cache.base = cache_.data();
  cache_ahead_ = std::make_unique<PagesAhead>(cache_, kBlocksAhead * cache.block_bytes);
  rope_capacity_ = (int)round_up((size_t)config.max_blocks_per_slot * kBlock, kRopeStep);
  rope_ = Region((size_t)rope_capacity_ * config.head_dim * sizeof(float));
  const size_t chunks = (size_t)config.max_blocks_per_slot * kBlock / kChunk + 1;
  const size_t split = (size_t)std::min(config.num_slots, 2 * team_.size()) * chunks;
  partials_ = Region(split * config.heads * (config.head_dim + 2) * sizeof(float));
  partial_counts_ = std::make_unique<std::atomic<int32_t>[]>((size_t)config.num_slots * config.kv_heads);
  block_tables_.assign((size_t)config.num_slots * config.max_blocks_per_slot, -1);
  last_token_.assign((size_t)config.num_slots, -1);
  slot_states_.resize((size_t)config.num_slots);
  changes_.resize((size_t)team_.size());
  for (int t = 0; t < team_.size(); t++)
    scratch_.emplace_back(std::max(kScratchBytes, sample_scratch_bytes(config.vocab)));
  step_.arena = arena_.data();
  step_.partials = (float*)partials_.data();
  step_.partial_counts = partial_counts_.get();
}

Executor::~Executor() {
  if (team_.forked()) (void)cache_ahead_.release();  // its thread is not here to be stopped
}

PackedMatrix Executor::pack(const std::vector<const uint8_t*>& rows, Format file, int k, bool tiles, int* bad_row) {
  if (tiles && kernels_ != kernels_amx())
    refuse(std::string("instruction set ") + kernels_->name + " multiplies quantized weights by int8 activations only");
  PackedMatrix m = packed_layout(packed_format(file, tiles), (int)rows.size(), k);
  size_t bytes = packed_bytes(m);
  if (weights_used_ + bytes > weights_.size()) refuse("weight memory is smaller than the weights packed into it");
  uint8_t* out = weights_.data() + weights_used_;
  *bad_row = ridgeline::pack(rows, file, m, out, team_);
  weights_used_ += bytes;
  m.data = out;
  return m;
}

const float* Executor::keep_vector(const float* values, size_t count) {
  vectors_.push_back(std::make_unique<float[]>(count));
  std::memcpy(vectors_.back().get(), values, count * sizeof(float));
  return vectors_.back().get();
}

const LinearArgs& Executor::keep_linear(const LinearArgs& a) {
  linears_.push_back(std::make_unique<LinearArgs>(a));
  if (linears_.size() > 1) linears_[linears_.size() - 2]->next = linears_.back().get();
  return *linears_.back();
}

void Executor::add_op(std::string name, std::function<void(const Step&, Worker&)> run, BarrierFree free) {
  op_names_.push_back(std::move(name));
  ops_.push_back({std::move(run), free});
}

bool Executor::needs_barrier(const Op& op) const {
  switch (op.free) {
    case BarrierFree::OneToken: return step_.tokens != 1;
    case BarrierFree::OneSampled: return step_.sampled != 1;
    case BarrierFree::OneEach: return !step_.one_each;
    default: return true;
  }
}

void Executor::check(const BatchView& b) const {
  check_requests(b);
  check_rows(b);
  check_blocks(b);
  check_slots(b);
}

void Executor::check_requests(const BatchView& b) const {
  if (b.tokens < 1 || b.tokens > config_.max_tokens) refuse("a step must hold 1 to max_tokens tokens");
  if (b.sampled < 0 || b.sampled > config_.max_sampled) refuse("more rows to sample than the plan was built for");
  if (b.requests < 1 || b.requests > config_.num_slots) refuse("more requests than slots");
  if (b.query_starts[0] != 0 || b.query_starts[b.requests] != b.tokens) refuse("query_starts must run from 0 to T");
  for (int r = 0; r < b.requests; r++)
    if (b.query_starts[r] >= b.query_starts[r + 1]) refuse("query_starts must ascend: every request needs a token");
  const int limit = config_.max_blocks_per_slot * kBlock;
  std::vector<bool> seen((size_t)config_.num_slots);
  for (int r = 0; r < b.requests; r++) {
    int begin = b.query_starts[r], end = b.query_starts[r + 1];
    if (b.slots[r] < 0 || b.slots[r] >= config_.num_slots) refuse("slot out of range");
    if (seen[(size_t)b.slots[r]]) refuse("a slot may have one request in a step");
    seen[(size_t)b.slots[r]] = true;
    for (int t = begin; t < end; t++) {
      if (b.positions[t] != b.positions[begin] + t - begin) refuse("positions of a request must be consecutive");
      int id = b.token_ids[t] >= 0 ? b.token_ids[t] : last_token_[(size_t)b.slots[r]];
      if (id < 0 || id >= config_.vocab) refuse("token id out of the vocabulary");
    }
    if (b.positions[begin] < 0 || b.positions[end - 1] >= limit) refuse("position outside the block table");
    if (b.context_lens[r] != b.positions[end - 1] + 1) refuse("context_lens must be the last position plus one");
  }
}

void Executor::check_rows(const BatchView& b) const {
  for (int i = 0; i < b.sampled; i++) {
    if (b.sample_rows[i] < 0 || b.sample_rows[i] >= b.tokens) refuse("sample row out of range");
    if (i > 0 && b.sample_rows[i] <= b.sample_rows[i - 1]) refuse("sample rows must ascend");
    const SamplingRow& row = b.sampling[i];
    if (row.target < kPool || row.target > config_.vocab) refuse("target must be POOL, 0, or 1 + a token");
    if (row.target != 0 && row.masked) refuse("a row that is scored or pooled takes no token mask");
    if (row.target == kPool && hidden_size == 0) refuse("this plan has no final norm whose rows could be pooled");
  }
}

void Executor::check_blocks(const BatchView& b) const {
  for (int i = 0; i < b.updates; i++) {
    const int32_t* u = b.block_updates + 3 * i;
    if (u[0] < 0 || u[0] >= config_.num_slots || u[1] < 0 || u[1] >= config_.max_blocks_per_slot || u[2] < 0 ||
        u[2] >= config_.num_blocks)
      refuse("block update out of range");
  }
  if (b.copies == 0) return;
  enum : uint8_t { Unused, Read, Written };
  std::vector<uint8_t> use((size_t)config_.num_blocks, Unused);
  for (int i = 0; i < 2 * b.copies; i++)
    if (b.block_copies[i] < 0 || b.block_copies[i] >= config_.num_blocks) refuse("block copy out of range");
  for (int i = 0; i < b.copies; i++) use[(size_t)b.block_copies[2 * i]] = Read;
  for (int i = 0; i < b.copies; i++) {  // copies run side by side: their order must not matter
    uint8_t& destination = use[(size_t)b.block_copies[2 * i + 1]];
    if (destination != Unused) refuse("a block that is copied to may be no other copy's source or destination");
    destination = Written;
  }
}

void Executor::check_slots(const BatchView& b) const {
  std::vector<int> known((size_t)config_.num_slots, -1);  // length of the log of slots that start
  for (const SlotStart& start : *b.slot_starts) {
    start.check(config_.num_slots, config_.vocab);
    if (known[(size_t)start.slot] >= 0) refuse("a slot may start once in a step");
    known[(size_t)start.slot] = start.asks_nothing() ? INT_MAX : (int)start.tokens.size();
  }
  for (int r = 0; r < b.requests; r++) {
    const size_t slot = (size_t)b.slots[r];
    const int length = known[slot] >= 0 ? known[slot] : slot_states_[slot] ? slot_states_[slot]->length() : INT_MAX;
    if (b.positions[b.query_starts[r]] > length)
      refuse("a slot with sampling state skips positions: its SlotStart must bring the tokens in the cache");
  }
}

void Executor::update_block_tables(const BatchView& b) {
  int32_t last = -1;
  for (int i = 0; i < b.updates; i++) {
    const int32_t* u = b.block_updates + 3 * i;
    block_tables_[(size_t)u[0] * config_.max_blocks_per_slot + u[1]] = u[2];
    last = std::max(last, u[2]);
  }
  for (int r = 0; r < b.requests; r++) {
    const int32_t* table = &block_tables_[(size_t)b.slots[r] * config_.max_blocks_per_slot];
    for (int i = 0; i <= (b.context_lens[r] - 1) / kBlock; i++)
      if (table[i] < 0) refuse("a request's context reaches past its block table");
  }
  cache_ahead_->begin((size_t)(last + 1) * step_.cache.block_bytes);
}

void Executor::extend_rope(int positions) {
  const int half = config_.head_dim / 2;
  float* cosines = (float*)rope_.data();
  float* sines = cosines + (size_t)rope_capacity_ * half;
  int upto = std::min(rope_capacity_, (int)round_up((size_t)positions, kRopeStep));
  for (; rope_ready_ < upto; rope_ready_++)
    for (int i = 0; i < half; i++) {
      double angle = rope_ready_ * config_.rope_frequency[(size_t)i];
      cosines[(size_t)rope_ready_ * half + i] = (float)std::cos(angle);
      sines[(size_t)rope_ready_ * half + i] = (float)std::sin(angle);
    }
  step_.rope_cos = cosines;
  step_.rope_sin = sines;
}

// Longest tasks first. One-token requests are split by chunk when there are too few to go round; their
// partials are merged in chunk order either way, so the bits do not depend on the choice.
void Executor::plan_attention(const BatchView& b) {
  const int group = config_.heads / config_.kv_heads, tile = std::max(1, kMaxTileRows / group);
  const bool scarce = b.requests * config_.kv_heads < 2 * team_.size();
  int split = 0;
  step_.attention.clear();
  for (int r = 0; r < b.requests; r++) {
    int begin = b.query_starts[r], end = b.query_starts[r + 1];
    int chunks = (b.context_lens[r] + kChunk - 1) / kChunk;
    if (end - begin == 1 && scarce && chunks > 1) {
      for (int c = 0; c < chunks; c++) step_.attention.push_back({r, begin, end, c, c + 1, split, chunks});
      split += chunks;
      continue;
    }
    for (int last = end; last > begin; last -= tile) {
      int first = std::max(begin, last - tile);
      step_.attention.push_back({r, first, last, 0, b.positions[last - 1] / kChunk + 1, -1, 0});
    }
  }
  auto work = [&](const AttentionTask& t) {
    return (long)(t.token_end - t.token_begin) * (t.split >= 0 ? kChunk : b.positions[t.token_end - 1] + 1);
  };
  const size_t claims = step_.attention.size() * (size_t)config_.kv_heads;
  if (claims > claims_size_) {
    claims_ = std::make_unique<std::atomic<uint32_t>[]>(claims);
    claims_size_ = claims;
    step_.attention_claims = claims_.get();
  }
  step_.first_claim += (uint32_t)config_.layers;
  std::stable_sort(step_.attention.begin(), step_.attention.end(),
                   [&](const AttentionTask& x, const AttentionTask& y) { return work(x) > work(y); });
}

void Executor::launch(const BatchView& b) {
  if (profile_.on) profile_.begin();
  check(b);
  update_block_tables(b);
  token_ids_.assign(b.token_ids, b.token_ids + b.tokens);
  positions_.assign(b.positions, b.positions + b.tokens);
  slots_.assign(b.slots, b.slots + b.requests);
  query_ends_.assign(b.query_starts + 1, b.query_starts + b.requests + 1);
  block_copies_.assign(b.block_copies, b.block_copies + 2 * b.copies);
  sample_rows_.assign(b.sample_rows, b.sample_rows + b.sampled);
  sampling_.assign(b.sampling, b.sampling + b.sampled);
  request_of_.resize((size_t)b.tokens);
  tables_.resize((size_t)b.requests);
  int longest = 0;
  for (int r = 0; r < b.requests; r++) {
    tables_[(size_t)r] = &block_tables_[(size_t)b.slots[r] * config_.max_blocks_per_slot];
    longest = std::max(longest, b.context_lens[r]);
    for (int t = b.query_starts[r]; t < b.query_starts[r + 1]; t++) {
      request_of_[(size_t)t] = r;
      if (token_ids_[(size_t)t] < 0) token_ids_[(size_t)t] = last_token_[(size_t)b.slots[r]];
    }
  }
  take_tokens(b);
  extend_rope(longest);
  plan_attention(b);
  plan_sampling(b);
  step_.tokens = b.tokens;
  step_.sampled = b.sampled;
  step_.requests = b.requests;
  step_.one_each = b.tokens == b.requests;
  list_read_blocks(b);
  step_.token_ids = token_ids_.data();
  step_.positions = positions_.data();
  step_.request_of = request_of_.data();
  step_.sample_rows = sample_rows_.data();
  step_.block_tables = tables_.data();
  tokens_.assign((size_t)b.sampled, -1);
  accepted_.assign((size_t)b.sampled, 1);
  logprobs_.assign((size_t)b.sampled, NAN);
  top_ids_.assign((size_t)b.sampled * num_top_, -1);
  top_logprobs_.assign((size_t)b.sampled * num_top_, NAN);
  run_ops();
  const bool whole =
      std::none_of(sampling_.begin(), sampling_.end(), [](const SamplingRow& row) { return row.masked != 0; });
  if (whole) settle();
  if (profile_.on) profile_.end(whole);
}

// Slots with a new owner start, and the logs of those with state take the tokens of this step.
void Executor::take_tokens(const BatchView& b) {
  for (const SlotStart& start : *b.slot_starts) {
    auto& state = slot_states_[(size_t)start.slot];
    state = start.asks_nothing() ? nullptr : std::make_unique<SlotState>(start);
  }
  for (int r = 0; r < b.requests; r++) {
    const int begin = b.query_starts[r];
    if (SlotState* state = slot_states_[(size_t)b.slots[r]].get())
      state->feed(positions_[(size_t)begin], token_ids_.data() + begin, b.query_starts[r + 1] - begin);
  }
}

void Executor::plan_sampling(const BatchView& b) {
  num_top_ = pooled_ = 0;
  hidden_rows_.assign((size_t)b.sampled, -1);
  sampling_tasks_.clear();
  int last_request = -1;
  for (int i = 0; i < b.sampled; i++) {
    const SamplingRow& row = sampling_[(size_t)i];
    if (row.target == kPool) {
      hidden_rows_[(size_t)i] = pooled_++;
    } else {
      num_top_ = std::max(num_top_, std::min(row.num_logprobs, config_.vocab));
    }
    const int request = request_of_[(size_t)sample_rows_[(size_t)i]];
    if (request != last_request || !slot_states_[(size_t)slots_[(size_t)request]]) sampling_tasks_.push_back(i);
    last_request = request;
  }
  sampling_tasks_.push_back(b.sampled);
  wants_logits_ = pooled_ < b.sampled || pooled_ == 0;
  hidden_.resize((size_t)pooled_ * (size_t)hidden_size);
  step_.hidden = pooled_ ? hidden_.data() : nullptr;
  step_.hidden_rows = hidden_rows_.data();
}

// Each thread copies some layers of every block.
void Executor::copy_blocks(int thread) {
  const KvCache& cache = step_.cache;
  const long begin = (long)config_.layers * thread / team_.size(), end = (long)config_.layers * (thread + 1) / team_.size();
  for (size_t i = 0; i < block_copies_.size(); i += 2) {
    const uint8_t* from = cache.keys(block_copies_[i], (int)begin, 0);
    std::memcpy(cache.keys(block_copies_[i + 1], (int)begin, 0), from, (size_t)(end - begin) * cache.layer_bytes);
  }
}

void Executor::list_read_blocks(const BatchView& b) {
  step_.kv_heads = config_.kv_heads;
  step_.read_blocks.clear();
  step_.read_starts.assign(1, 0);
  for (int r = 0; step_.one_each && r < b.requests; r++) {
    for (int i = 0; i <= (b.context_lens[r] - 1) / kBlock; i++) {
      const int block = tables_[(size_t)r][i];
      step_.read_blocks.push_back(step_.cache.keys(block, 0, 0));
    }
    step_.read_starts.push_back((int32_t)step_.read_blocks.size());
  }
}

void Executor::run_ops() {
  const size_t end = wants_logits_ ? ops_.size() : std::min(head_, ops_.size());
  std::function<void(int)> job = [&](int thread) {
    Worker w{team_, thread, 0, scratch_[(size_t)thread].data()};
    std::optional<Profile::Lap> lap;
    if (profile_.on) lap.emplace(profile_, thread);
    if (!block_copies_.empty()) {
      copy_blocks(thread);
      if (lap) lap->worked(profile_.row(Profile::Copies));
      team_.barrier();
      if (lap) lap->waited(profile_.row(Profile::Copies));
    }
    for (size_t i = 0; i < end; i++) {
      ops_[i].run(step_, w);
      if (lap) lap->worked(i);
      if (!needs_barrier(ops_[i])) continue;
      team_.barrier();
      if (lap) lap->waited(i);
    }
    team_.share((int)sampling_tasks_.size() - 1, 1, [&](int task, int) {
      for (int row = sampling_tasks_[(size_t)task]; row < sampling_tasks_[(size_t)task + 1]; row++)
        if (!sampling_[(size_t)row].masked) sample_row(row, nullptr, thread);
    });
    if (lap) lap->worked(profile_.row(Profile::Sample));
  };
  if (profile_.on) profile_.call();
  team_.run(job);
  if (profile_.on) profile_.add(end, !block_copies_.empty());
}

void Executor::finish(const uint32_t* masks, int flagged) {
  std::vector<int> rows;
  for (int i = 0; i < step_.sampled; i++)
    if (sampling_[(size_t)i].masked) rows.push_back(i);
  if ((int)rows.size() != flagged) refuse("finish needs one token mask for each row flagged as masked");
  if (rows.empty()) return;
  if (profile_.on) profile_.begin();
  const size_t words = ((size_t)config_.vocab + 31) / 32;
  for (int i = 0; i < flagged; i++) {
    const uint32_t* mask = masks + words * i;
    bool any = mask[words - 1] << (31 - (config_.vocab - 1) % 32) != 0;
    for (size_t w = 0; w + 1 < words; w++) any |= mask[w] != 0;
    if (!any) refuse("a token mask allows no token");
  }
  std::vector<int> mask_of((size_t)step_.sampled, -1);
  for (int i = 0; i < flagged; i++) mask_of[(size_t)rows[(size_t)i]] = i;
  std::function<void(int)> job = [&](int thread) {
    std::optional<Profile::Lap> lap;
    if (profile_.on) lap.emplace(profile_, thread);
    team_.share((int)sampling_tasks_.size() - 1, 1, [&](int task, int) {
      for (int row = sampling_tasks_[(size_t)task]; row < sampling_tasks_[(size_t)task + 1]; row++)
        if (mask_of[(size_t)row] >= 0) sample_row(row, masks + words * mask_of[(size_t)row], thread);
    });
    if (lap) lap->worked(profile_.row(Profile::Sample));
  };
  if (profile_.on) profile_.call();
  team_.run(job);
  if (profile_.on) profile_.add(0, false);
  settle();
  if (profile_.on) profile_.end(true);
}

void Executor::sample_row(int row, const uint32_t* mask, int thread) {
  size_t i = (size_t)row, k = (size_t)num_top_;
  if (sampling_[i].target == kPool) return;
  int token_row = sample_rows_[i];
  SampleArgs a{};
  a.logits = logits_at(row);
  a.slot = slot_states_[(size_t)slots_[(size_t)request_of_[(size_t)token_row]]].get();
  a.changes = &changes_[(size_t)thread];
  a.vocab = config_.vocab;
  a.row = &sampling_[i];
  a.position = positions_[(size_t)token_row] + 1;
  a.mask = mask;
  a.num_top = num_top_;
  a.token = &tokens_[i];
  a.logprob = &logprobs_[i];
  a.top_ids = top_ids_.data() + i * k;
  a.top_logprobs = top_logprobs_.data() + i * k;
  a.scratch = scratch_[(size_t)thread].data();
  kernels_->sample(a);
}

// Which rows stand, and what their slots sampled last: once a row has sampled another token than the one fed after it
// (a draft), later rows of its request saw what will never be. Scored and pooled rows always stand and change neither.
void Executor::settle() {
  int request = -1;
  bool stands = true;
  for (size_t i = 0; i < tokens_.size(); i++) {
    const int row = sample_rows_[i];
    if (request != request_of_[(size_t)row]) stands = true;
    request = request_of_[(size_t)row];
    if (sampling_[i].target != 0) continue;
    accepted_[i] = stands;
    if (stands && tokens_[i] >= 0) last_token_[(size_t)slots_[(size_t)request]] = tokens_[i];
    if (row + 1 < query_ends_[(size_t)request] && token_ids_[(size_t)row + 1] != tokens_[i]) stands = false;
  }
  cache_ahead_->end();
}

void Executor::set_profiling(bool on) {
  if (on && profile_.rows().size() != ops_.size() + Profile::kExtras) reset_profile();
  profile_.on = on;
}

double measure_bandwidth(const Kernels& kernels, size_t bytes, int threads, double seconds) {
  Region buffer(bytes);
  std::memset(buffer.data(), 1, bytes);
  Team team(threads > 0 ? threads : available_threads());
  const size_t part = bytes / (size_t)team.size() / 4096 * 4096;
  double best = 0;
  for (double begin = now(); now() - begin < seconds;)
    for (int variant = 0; variant < 4; variant++) {
      double t = now();
      team.run([&](int thread) { kernels.read_bytes(buffer.data() + part * (size_t)thread, part, variant); });
      best = std::max(best, (double)part * team.size() / (now() - t));
    }
  return best;
}

double measure_peak(const Kernels& kernels, int kind, int threads) {
  Team team(threads > 0 ? threads : available_threads());
  double best = 0;
  for (int repeat = 0; repeat < 8; repeat++) {
    std::vector<double> done((size_t)team.size());
    double t = now();
    team.run([&](int thread) { done[(size_t)thread] = kernels.spin_ops(kind, 200000); });
    double total = 0;
    for (double d : done) total += d;
    best = std::max(best, total / (now() - t));
  }
  return best;
}

}  // namespace ridgeline
