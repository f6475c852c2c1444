// Rotary embedding of queries and keys, and the cache write, for steps that hold prompts. Where every request has
// one token, attention does this itself, head by head.
#include "kernels/kv.h"
#include "kernels/table.h"

namespace ridgeline::RL_ISA {
namespace {

template <Dtype kType>
void rope_token(const RopeKvArgs& a, const Step& s, int t) {
  constexpr size_t kElement = query_bytes(kType);
  uint8_t* q = s.at(a.q, t);
  for (int h = 0; h < a.heads; h++) rope_query<kType>(a, s, t, h, q + (size_t)h * a.head_dim * kElement);
  for (int h = 0; h < a.kv_heads; h++) rope_key_value<kType>(a, s, t, h);
}

}  // namespace

void rope_kv(const RopeKvArgs& a, const Step& s, Worker& w) {
  if (s.one_each) return;
  auto token = s.cache.dtype == Dtype::BF16  ? rope_token<Dtype::BF16>
               : s.cache.dtype == Dtype::F16 ? rope_token<Dtype::F16>
               : s.cache.dtype == Dtype::Q8  ? rope_token<Dtype::Q8>
                                             : rope_token<Dtype::F32>;
  w.team.own(w.thread, s.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; t++) token(a, s, t);
  });
}

}  // namespace ridgeline::RL_ISA
