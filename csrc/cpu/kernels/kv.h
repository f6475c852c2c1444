// Where a key or value lies in the paged cache (layout: KvCache in step.h), for each stored type.
#pragma once

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

template <Dtype kType>
struct Kv {
  static constexpr int kPair = kType == Dtype::BF16 ? 2 : 1;   // dims (keys) or tokens (values) side by side
  static constexpr int kBytes = kType == Dtype::F32 ? 4 : 2;
};

// The start of one KV head's keys in a block; its values follow kBlock * head_dim elements later.
inline uint8_t* kv_head_at(const KvCache& c, int block, int layer, int head, int head_dim) {
  size_t element = c.dtype == Dtype::F32 ? 4 : 2;
  return c.base + (size_t)block * c.block_bytes + (size_t)layer * c.layer_bytes +
         (size_t)head * 2 * kBlock * head_dim * element;
}

}  // namespace ridgeline::RL_ISA
