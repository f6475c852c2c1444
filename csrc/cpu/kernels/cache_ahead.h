// Fetching the KV cache that the next attention reads while the products before it compute.
#pragma once

#include <algorithm>

#include "isa/isa.h"
#include "kernels/fetch.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// With more requests products leave memory time for the cache. Weights unpacked for tiles do so from two on, since that
// takes longer than reading. (For one, what attention gains the products lose.)
inline int busy_rows(Format f) { return is_tiled(f) ? 1 : fetching.busy_rows; }

// Hands out, piece by piece, the cache that this thread's next attention tasks read. Enough rows keep a product busy
// with arithmetic while memory is idle; attention, the other way round, waits for memory.
class CacheAhead {
 public:
  CacheAhead(const LinearArgs& a, const Step& s, Worker& w) : layer_(a.next_layer), s_(s), w_(w) {
    const int size = w.team.size();
    const size_t first = (size_t)((long)s.requests * w.thread / size);
    const size_t last = (size_t)((long)s.requests * (w.thread + 1) / size);
    const bool spare = s.one_each && s.requests > busy_rows(a.w.format) && a.next_layer >= 0 && is_quantized(a.w.format);
    begin_ = spare ? s.read_starts[first] : 0;
    blocks_ = spare ? s.read_starts[last] - begin_ : 0;
    if (blocks_ && w.fetch_layer != layer_) w.fetch_layer = layer_, w.fetched = w.fetched_lines = 0;
  }

  // What comes next, for a product that fetches `lines` of it with each of `groups` groups of K.
  Runs take(int groups, int lines) {
    if (w_.fetched >= blocks_) return {};
    const size_t offset = (size_t)layer_ * s_.cache.layer_bytes;
    const uint8_t* const* blocks = &s_.read_blocks[(size_t)(begin_ + w_.fetched)];
    const int whole = (int)(s_.cache.layer_bytes / 64), each = (whole + lines - 1) / lines;
    const int left = (whole - w_.fetched_lines + lines - 1) / lines;
    const Runs runs{blocks[0] + offset + 64 * (size_t)w_.fetched_lines, left, blocks + 1, offset, each,
                    std::min(groups, left + (blocks_ - w_.fetched - 1) * each), lines};
    if (groups < left) {
      w_.fetched_lines += groups * lines;
    } else {
      w_.fetched += 1 + (groups - left) / each;
      w_.fetched_lines = (groups - left) % each * lines;
    }
    return runs;
  }

 private:
  const int layer_;
  const Step& s_;
  Worker& w_;
  int begin_ = 0, blocks_ = 0;
};

}  // namespace ridgeline::RL_ISA
