// What a kernel is handed: its arguments (fixed when the plan is built), the step, and its thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed.h"
#include "slots.h"
#include "team.h"

namespace ridgeline {

// A matrix in the arena, one row per token (or per sampled row).
struct Buffer {
  size_t offset = 0;
  size_t stride = 0;  // bytes between rows
};

enum class Rows : int32_t { Tokens, Sampled };
enum class Dtype : int32_t { F32, F16, BF16, Q8 };

// One piece of attention: some tokens of a request against some chunks of its keys, for each KV head.
struct AttentionTask {
  int32_t request;
  int32_t token_begin, token_end;  // indices into the batch
  int32_t chunk_begin, chunk_end;
  int32_t split;  // index among the partial results, or -1 when this task sees every chunk
  int32_t num_splits;
};

// The paged cache: [block][layer][KV head][keys, values], so that what a layer reads of a block lies together wherever
// the block is. A block's keys are [head_dim / P][16 tokens][P], its values [16 tokens / P][head_dim][P], P = 2 for
// bf16 (the pairs its dot product takes), 4 for int8, else 1. An int8 block's keys (codes plus 128) and its values
// (codes) are each followed by the 16 tokens' fp32 scales.
struct KvCache {
  uint8_t* base = nullptr;
  size_t block_bytes = 0;
  size_t layer_bytes = 0;  // of a block
  size_t keys_bytes = 0;   // of one head's keys (or values) in it
  Dtype dtype = Dtype::BF16;

  // The keys of one KV head in a block; its values follow keys_bytes later.
  uint8_t* keys(int block, int layer, int head) const {
    return base + (size_t)block * block_bytes + (size_t)layer * layer_bytes + (size_t)head * 2 * keys_bytes;
  }
};
// Bytes of one token's key (or value) of one head.
inline size_t kv_row_bytes(Dtype dtype, int head_dim) {
  return dtype == Dtype::Q8 ? (size_t)head_dim + 4 : (size_t)head_dim * (dtype == Dtype::F32 ? 4 : 2);
}
inline constexpr int kBlock = 16;         // tokens per KV block
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxTileRows = 48;   // query rows of one attention task: tokens times heads sharing a KV head
inline constexpr int kChunk = 256;        // keys per independent attention partial

struct Step {
  int tokens = 0, sampled = 0, requests = 0;
  bool one_each = false;  // every request has one token: attention rotates and writes keys itself
  uint8_t* arena = nullptr;
  const int32_t* token_ids = nullptr;       // [tokens], already resolved
  const int32_t* positions = nullptr;       // [tokens]
  const int32_t* request_of = nullptr;      // [tokens]
  const int32_t* sample_rows = nullptr;     // [sampled]
  const int32_t* const* block_tables = nullptr;  // [requests]
  float* hidden = nullptr;                  // [pooled rows][hidden size] of final hidden states; null: none wanted
  const int32_t* hidden_rows = nullptr;     // [sampled]: where in `hidden` a row's goes, or -1
  std::vector<AttentionTask> attention;
  std::atomic<uint32_t>* attention_claims = nullptr;  // [attention][kv_heads]: the last operator that ran it
  uint32_t first_claim = 0;                           // plus the layer: this operator's mark, new in every step
  KvCache cache;
  int kv_heads = 0;
  std::vector<const uint8_t*> read_blocks;  // layer 0 of the blocks a step of decodes reads, by request
  std::vector<int32_t> read_starts;         // [requests + 1]: each request's part of read_blocks
  const float* rope_cos = nullptr;          // [positions][head_dim / 2]
  const float* rope_sin = nullptr;
  float* partials = nullptr;                // split attention: results waiting to be merged
  std::atomic<int32_t>* partial_counts = nullptr;

  int rows(Rows r) const { return r == Rows::Tokens ? tokens : sampled; }
  uint8_t* at(const Buffer& b, size_t row = 0) const { return arena + b.offset + row * b.stride; }
};

struct Worker {
  Team& team;
  int thread;
  int calls;         // of Team::balance in this step
  uint8_t* scratch;  // this thread's own, at least kScratchBytes
  int fetch_layer = -1;                // the layer whose cache is being fetched,
  int fetched = 0, fetched_lines = 0;  // how many blocks of it are, and lines of the one after them
};
inline constexpr size_t kScratchBytes = 2 << 20;

struct EmbedArgs {
  Buffer out;
  PackedMatrix table;
};
struct NormArgs {
  Buffer x, delta, sum, out;
  bool has_delta = false;
  bool per_thread = false;    // a single row is computed by every thread, thread t's sum and result in row t
  bool x_per_thread = false;  // a single row of x is thread t's own, in row t: sums may then replace it
  bool is_final = false;    // its rows, in fp32, are the final hidden states
  const float* weight = nullptr;
  int32_t k = 0;
  float eps = 0;
  Dtype out_dtype = Dtype::F32;
  Rows rows = Rows::Tokens;
};
struct QuantizeArgs {
  Buffer x, out;
  int32_t k = 0;
  Dtype out_dtype = Dtype::Q8;
  Rows rows = Rows::Tokens;
};
enum class Epilogue : int32_t { None, SiluMul };
struct LinearArgs {
  Buffer x, out;
  PackedMatrix w;
  Epilogue epilogue = Epilogue::None;
  bool per_thread = false;  // a single row of x is read from row t by thread t
  Dtype out_dtype = Dtype::F32;
  Rows rows = Rows::Tokens;
  int32_t next_layer = -1;  // whose cache the next attention reads, or -1
  const LinearArgs* next = nullptr;  // the linear that follows in the plan, if one does: its weights are wanted soon
};
struct RopeKvArgs {
  Buffer qkv, q;
  int32_t heads = 0, kv_heads = 0, head_dim = 0, layer = 0;
};
struct AttentionArgs {
  RopeKvArgs rope;  // its q is what attention reads
  Buffer out;
  float scale = 0;
  Dtype out_dtype = Dtype::F32;
};
struct SelectArgs {
  Buffer x, out;
  size_t row_bytes = 0;
};
enum class Elementwise : int32_t { Add, Mul, Silu, SiluMul };
struct ElementwiseArgs {
  Buffer a, b, out;
  int32_t k = 0;
  Elementwise op = Elementwise::Add;
  Dtype out_dtype = Dtype::F32;
  Rows rows = Rows::Tokens;
};
struct ConcatArgs {
  Buffer parts[3], out;
  int32_t widths[3] = {0, 0, 0};
  int32_t count = 0;
  Rows rows = Rows::Tokens;
};

// One row of sampling parameters: core/types.py SAMPLING_DTYPE.
struct SamplingRow {
  uint64_t seed;
  float temperature, top_p, min_p;
  int32_t top_k, sample_index, num_logprobs, masked, target;
};
static_assert(sizeof(SamplingRow) == 40);

inline constexpr int32_t kPool = -1;  // SamplingRow::target of a row whose hidden state is wanted

struct SampleArgs {
  float* logits;            // as they were again when the call is over
  int32_t vocab;
  const SamplingRow* row;
  int32_t position;         // of the token being sampled
  const uint32_t* mask;     // allowed tokens, or null
  SlotState* slot;          // what changes the logits before anything else, or null
  std::vector<ChangedLogit>* changes;  // scratch for those
  int32_t num_top;          // entries of top_ids / top_logprobs
  int32_t* token;
  float* logprob;
  int32_t* top_ids;
  float* top_logprobs;
  uint8_t* scratch;         // sample_scratch_bytes
};
// Four arrays of 4-byte numbers, one for each token with room for a vector more, and the maxima of groups of 256.
inline size_t sample_scratch_bytes(int vocab) { return 16 * ((size_t)vocab + 16) + 64 * ((size_t)vocab / 256 + 1); }

// How this processor likes memory to be fetched ahead: the same instructions help one design and hinder the next
// (docs/perf-log.md). Results do not depend on it.
struct Fetching {
  bool second_level = false;         // lines stop at the second-level cache,
  bool stream_second_level = false;  // and those of weights for one and two rows
  bool two_streams = true;           // one and two rows read two units of weights side by side
  size_t stream_ahead = 4096;        // bytes further on that weights are fetched for one and two rows,
  size_t ahead = 16384;              // and for one register block of more
  bool whole_panels = true;          // which of 8-bit weights fetches the next panel at once instead
  int busy_rows = 8;                 // requests beyond which products leave memory time for the cache
  int few_lines = 6;                 // lines that a few register blocks fetch with a group of K, a multiple of 6
};
extern const Fetching fetching;

// Whether byte additions of whole vectors start beside byte products, which then pays to add more and multiply less
// (kernels/gemm_paired.h). Results do not depend on it either.
extern const bool adds_beside_products;

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*embed)(const EmbedArgs&, const Step&, Worker&);
  void (*norm)(const NormArgs&, const Step&, Worker&);
  void (*quantize)(const QuantizeArgs&, const Step&, Worker&);
  void (*linear)(const LinearArgs&, const Step&, Worker&);
  void (*rope_kv)(const RopeKvArgs&, const Step&, Worker&);
  void (*attention)(const AttentionArgs&, const Step&, Worker&);
  void (*select)(const SelectArgs&, const Step&, Worker&);
  void (*elementwise)(const ElementwiseArgs&, const Step&, Worker&);
  void (*concat)(const ConcatArgs&, const Step&, Worker&);
  void (*sample)(const SampleArgs&);
  double (*read_bytes)(const uint8_t* data, size_t bytes, int variant);  // returns a checksum
  double (*spin_ops)(int kind, long iterations);                        // returns operations done
};

std::vector<const Kernels*> available_kernels();  // that this build and this processor have, the fastest first
const Kernels* kernels_amx();  // null when they lack it, or when the kernel refuses this process the tile registers

}  // namespace ridgeline
