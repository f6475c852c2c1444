// Fetching the KV cache that the next attention reads while the products before it compute.
#pragma once

#include <algorithm>

#include "isa/isa.h"
#include "kernels/gemm_q8.h"
#include "step.h"

namespace ridgeline::RL_ISA {

inline constexpr int kStreamRows = 16;  // up to here reading the weights matters beside the arithmetic
// With more requests, products leave memory time for the cache. Weights unpacked for tiles do so from two on, since that
// takes longer than reading. (For one, what attention gains the products lose.)
inline constexpr int busy_rows(Format f) { return is_tiled(f) ? 1 : kStreamRows; }
// Lines of the cache fetched with each group of K of a product: on tiles there is one for 32 rows.
inline constexpr int lines_per_group(Format f) { return is_tiled(f) ? 2 * kLinesPerGroup : kLinesPerGroup; }
inline constexpr size_t kFetchAhead = 16384;  // bytes further on that weights are fetched

// Hands out, piece by piece, the cache that this thread's next attention tasks read. Enough rows keep a product busy
// with arithmetic while memory is idle; attention, the other way round, waits for memory.
class CacheAhead {
 public:
  CacheAhead(const LinearArgs& a, const Step& s, Worker& w) : a_(a), s_(s), w_(w) {
    const int size = w.team.size();
    const size_t first = (size_t)((long)s.requests * w.thread / size);
    const size_t last = (size_t)((long)s.requests * (w.thread + 1) / size);
    const bool spare = s.one_each && s.requests > busy_rows(a.w.format) && a.next_layer >= 0 && is_quantized(a.w.format);
    begin_ = spare ? s.read_starts[first] : 0;
    blocks_ = spare ? s.read_starts[last] - begin_ : 0;
    span_ = std::max(1, (int)((size_t)(a.w.k / kGroup) * lines_per_group(a.w.format) * 64 / (s.cache.run_bytes / kCluster)));
    if (blocks_ && w.fetch_layer != a.next_layer) w.fetch_layer = a.next_layer, w.fetched = 0;
  }

  // The keys or values of one head in the next blocks, as many as one product fetches; null at the end. Blocks in a
  // row are taken to lie in a row.
  const uint8_t* take() {
    if (w_.fetched >= blocks_ * 2 * s_.kv_heads) return nullptr;
    const int part = w_.fetched / blocks_, at = w_.fetched % blocks_;
    const uint8_t* block = s_.read_blocks[(size_t)(begin_ + at)];
    w_.fetched += std::min(span_, blocks_ - at);
    return block + (size_t)a_.next_layer * s_.cache.layer_bytes + (size_t)part * s_.cache.run_bytes;
  }

 private:
  const LinearArgs& a_;
  const Step& s_;
  Worker& w_;
  int begin_ = 0, blocks_ = 0, span_ = 1;
};

}  // namespace ridgeline::RL_ISA
