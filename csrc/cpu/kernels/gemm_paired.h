// The integer matrix product with half the multiplications: int8 activations by 4-bit weights.
//
// S. Winograd, "A New Algorithm for Inner Product" (IEEE Transactions on Computers, 1968): for pairs of activations (a, b)
// and weights (v, w), sum(a v + b w) = sum((a + w) (b + v)) - sum(a b) - sum(v w), and the last two sums hang on the row
// alone and on the column alone. One product and two additions do the work of two products then; where byte additions start
// beside products, twice as many pipes share them. Sums are exact integers: the bits are gemm_q8.h's.
//
// A pair is what lies in a byte of 4-bit codes, K i and K 16 + i of a group. Both sums must fit a byte, of which the first
// is unsigned: to its weights kFirstBias is added, to the second's kSecondBias, and activations are quantized to suit
// (packed.h). The last word of a group is multiplied as in gemm_q8.h, which keeps all pipes equally busy.
#pragma once

#include "kernels/gemm_q8.h"

namespace ridgeline::RL_ISA {

// That is what high_nibbles_plus_112 and low_nibbles_minus_16 add.
static_assert(kFirstBias == 112 && kSecondBias == -16);

// A group of a panel, taken apart once for all rows.
struct PairedGroup {
  I32 high[4][2], low[4][2];  // codes by word and tile, with their biases in the first kPairedWords
  I32 start[2];               // less the column's sum of products of pairs
  F32 scales[2], minima[2];
};
inline constexpr bool can_pair(Format f) { return f == Format::Q4_0 || f == Format::Q4_1; }

// What lies `ahead` bytes further on is fetched meanwhile, if that is not 0.
template <Format kFormat>
inline void take_apart(PairedGroup* to, int k, const uint8_t* record, size_t ahead) {
  for (int g = 0; g < k / kGroup; g++, record += record_bytes(kFormat)) {
    if (ahead) prefetch_lines<(record_bytes(kFormat) + 63) / 64>(record + ahead, fetching.second_level);
    PairedGroup& group = to[g];
RL_UNROLL
    for (int c = 0; c < 2; c++) {
      I32 products = zero_i();
RL_UNROLL
      for (int j = 0; j < 4; j++) {
        const I32 codes = load_i(record + 128 * j + 64 * c);
        const bool paired = j < kPairedWords;
        group.high[j][c] = paired ? high_nibbles_plus_112(codes) : high_nibbles(codes);
        group.low[j][c] = paired ? low_nibbles_minus_16(codes) : low_nibbles(codes);
        if (paired) products = dot_u8s8(products, group.high[j][c], group.low[j][c]);
      }
      group.start[c] = sub_i(zero_i(), products);
      group.scales[c] = load_f16(record + code_bytes(kFormat) + 32 * c);
      if (kFormat == Format::Q4_1) group.minima[c] = load_f16(record + code_bytes(kFormat) + 64 + 32 * c);
    }
  }
}

// R rows of `x` (q8, `stride` bytes apart) by one panel. Meanwhile what is wanted from `elsewhere` is fetched.
template <Format kFormat, int R>
inline __attribute__((always_inline)) void gemm_paired(F32 (&result)[R][2], int k, const PairedGroup* panel, const uint8_t* x,
                                                       size_t stride, const Runs& elsewhere) {
  Fetcher fetcher(elsewhere);
  const Q8Group* rows[R];
  start_rows<R>(rows, x, stride);
  F32 out[R][2];  // a local array: GCC stores the caller's once a group
RL_UNROLL
  for (int r = 0; r < R; r++) out[r][0] = out[r][1] = zero_f();
  const PairedGroup* group = panel;
  for (int g = 0; g < k / kGroup; g++, group++, next_group<R>(rows)) {
    fetcher.fetch<kLinesPerGroup>();
    I32 acc[R][2];
RL_UNROLL
    for (int r = 0; r < R; r++) {
      const I32 row = splat_i((int32_t)((uint32_t)rows[r]->paired - kZeroPoint<kFormat> * (uint32_t)rows[r]->sum));
      acc[r][0] = add_i(group->start[0], row);
      acc[r][1] = add_i(group->start[1], row);
    }
RL_UNROLL
    for (int i = 0; i < 4; i++) {
      const int j = (i + kPairedWords) % 4;
      const I32 high[2] = {group->high[j][0], group->high[j][1]}, low[2] = {group->low[j][0], group->low[j][1]};
RL_UNROLL
      for (int r = 0; r < R; r++) {
        const I32 a = splat_word(rows[r]->codes + 4 * j), b = splat_word(rows[r]->codes + 16 + 4 * j);
        if (j < kPairedWords) {
          I32 c0 = acc[r][0], c1 = acc[r][1];
          dot_paired(c0, c1, a, b, high, low);
          acc[r][0] = c0, acc[r][1] = c1;
        } else {
RL_UNROLL
          for (int c = 0; c < 2; c++) acc[r][c] = dot_u8s8(dot_u8s8(acc[r][c], low[c], a), high[c], b);
        }
      }
    }
RL_UNROLL
    for (int r = 0; r < R; r++) {
      const F32 scale = splat(rows[r]->scale), scaled_sum = splat(rows[r]->scaled_sum);
RL_UNROLL
      for (int c = 0; c < 2; c++) {
        out[r][c] = fma(to_f(acc[r][c]), mul(group->scales[c], scale), out[r][c]);
        if (kFormat == Format::Q4_1) out[r][c] = fma(group->minima[c], scaled_sum, out[r][c]);
      }
    }
  }
RL_UNROLL
  for (int r = 0; r < R; r++) result[r][0] = out[r][0], result[r][1] = out[r][1];
}

}  // namespace ridgeline::RL_ISA
