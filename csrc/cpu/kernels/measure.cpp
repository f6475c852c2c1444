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
  return (double)reduce_add_i(add_i(add_i(a, b), add_i(c, d)));
}

// Sixteen independent chains of one instruction; kind 0 int8, 1 bf16, 2 fp32. Returns operations done.
double spin_ops(int kind, long iterations) {
  F32 f[16];
  I32 n[16];
  for (int i = 0; i < 16; i++) f[i] = zero_f(), n[i] = zero_i();
  I32 ones = splat_i(0x01010101), pairs = splat_i(0x3c003c00);
  F32 small = splat(1e-3f);
  for (long k = 0; k < iterations; k++) {
    // The compiler must not see that the operands never change.
    asm volatile("" : "+m"(ones), "+m"(pairs), "+m"(small));
    if (kind == 0) {
RL_UNROLL
      for (int i = 0; i < 16; i++) n[i] = dot_u8s8(n[i], ones, ones);
    } else if (kind == 1) {
RL_UNROLL
      for (int i = 0; i < 16; i++) f[i] = dot_bf16(f[i], pairs, pairs);
    } else {
RL_UNROLL
      for (int i = 0; i < 16; i++) f[i] = fma(small, small, f[i]);
    }
  }
  F32 total = zero_f();
  for (int i = 0; i < 16; i++) total = add(total, add(f[i], to_f(n[i])));
  volatile float sink = reduce_add(total);
  (void)sink;
  const double per_lane[] = {8, 4, 2};
  return (double)iterations * 16 * 16 * per_lane[kind];
}

}  // namespace ridgeline::RL_ISA
