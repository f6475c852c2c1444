// The machine's own ceilings, measured with the instructions the kernels use: reads and multiply-adds.
#include "kernels/table.h"

namespace ridgeline::RL_ISA {

// Reads `bytes` (a multiple of 512) once; variants differ in streams and prefetch, since no one pattern is
// the fastest on every memory system.
double read_bytes(const uint8_t* data, size_t bytes, int variant) {
  I32 a = zero_i(), b = zero_i(), c = zero_i(), d = zero_i();
  if (variant == 0 || variant == 1) {
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
      if (variant == 1) {
        for (int j = 0; j < 256; j += 64) prefetch(data + i + 2048 + j);
      }
      a = add_i(a, load_i(data + i));
      b = add_i(b, load_i(data + i + 64));
      c = add_i(c, load_i(data + i + 128));
      d = add_i(d, load_i(data + i + 192));
    }
  } else {  // two or four streams side by side
    const size_t streams = variant == 2 ? 2 : 4, part = bytes / streams / 256 * 256;
    for (size_t i = 0; i < part; i += 256)
      for (size_t s = 0; s < streams; s++) {
        const uint8_t* p = data + s * part + i;
        a = add_i(a, load_i(p));
        b = add_i(b, load_i(p + 64));
        c = add_i(c, load_i(p + 128));
        d = add_i(d, load_i(p + 192));
      }
  }
  I32 all[8] = {add_i(add_i(a, b), add_i(c, d))};
  float lanes[16];
  store_i(lanes, reduce_add8(all));
  return (double)lanes[kLaneOf[0]];
}

constexpr int kChains = kTwoRegisters ? 6 : 12;
alignas(64) constexpr int32_t kStart[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
I32 start_i(int chain) { return add_i(load_i(kStart), splat_i(16 * chain)); }
F32 start_f(int chain) { return to_f(start_i(chain)); }

// Independent chains of one instruction, as many as hide its latency. The operands are volatile once, so as not to be
// folded, and chains and lanes start apart, so as not to be merged.
template <class Acc, class Next>
inline __attribute__((always_inline)) float chains(Acc (*start)(int), long iterations, Next next) {
  Acc acc[kChains];
RL_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = start(i);
  for (long k = 0; k < iterations; k += 8) {
RL_UNROLL
    for (int again = 0; again < 8; again++) {
RL_UNROLL
      for (int i = 0; i < kChains; i++) acc[i] = next(acc[i]);
    }
  }
  float total = 0;
  for (int i = 0; i < kChains; i++) {
    float lanes[16];
    __builtin_memcpy(lanes, &acc[i], sizeof lanes);
    for (float lane : lanes) total += lane;  // all, or none of the others would be computed
  }
  return total;
}

#if defined(RL_ISA_AMX)
// Four independent sums of full tiles: 16 rows by 16 columns by 64 bytes of K.
double spin_tiles(int kind, long iterations) {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.shape(t, 16, 64);
  tile_configure(config);
  for (long k = 0; k < iterations; k++) {
    if (kind == 0) {
      tile_dot_u8s8<0, 4, 6>(), tile_dot_u8s8<1, 4, 7>(), tile_dot_u8s8<2, 5, 6>(), tile_dot_u8s8<3, 5, 7>();
    } else {
      tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>(), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_release();
  return (double)iterations * 4 * 16 * 16 * (kind == 0 ? 64 : 32) * 2;
}
#endif

// kind 0: int8 dot, 1: bf16 dot, 2: fp32 fused multiply-add. Returns operations done.
double spin_ops(int kind, long iterations) {
#if defined(RL_ISA_AMX)
  if (kind < 2) return spin_tiles(kind, iterations);
#endif
  volatile int32_t one = 0x01010101, pair = 0x3c003c00;
  volatile float thousandth = 1e-3f;
  const I32 ones = splat_i(one), pairs = splat_i(pair);
  const F32 small = splat(thousandth);
  volatile float sink = 0;
  auto dot = [&](auto x) {
    if constexpr (kTwoRegisters) {
      return dot_u4s8(x, ones, ones);
    } else {
      return dot_u8s8(x, ones, ones);
    }
  };
  if (kind == 0) sink = chains(start_i, iterations, dot);
  if (kind == 1) sink = chains(start_f, iterations, [&](F32 x) { return dot_bf16(x, pairs, pairs); });
  if (kind == 2) sink = chains(start_f, iterations, [&](F32 x) { return fma(small, small, x); });
  (void)sink;
  const double per_lane[] = {8, 4, 2};
  return (double)((iterations + 7) / 8 * 8) * kChains * kLanes * per_lane[kind];
}

}  // namespace ridgeline::RL_ISA
