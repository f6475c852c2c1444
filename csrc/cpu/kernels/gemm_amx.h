// The integer matrix product on tile registers: up to 16 rows of activations by 16 columns of weights at a time.
//
// Bit for bit what gemm_q8.h computes: the products of a group are summed exactly, by int8 tiles into integers or,
// with every code and activation an integer that bf16 holds exactly, by bf16 tiles into fp32, where all partial sums
// stay below 2^24. Scaling, its order and the separate chain of minima are the same.
//
// A tile product takes one cycle a row whether it sums 32 or 64 bytes of K, and a group is 32, so bf16 tiles are as
// fast as int8 ones and save the conversion; int8 tiles are unpacked with a third of the work. Hence int8 for few
// rows, bf16 for many.
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

inline constexpr int kTileRows = 16;
enum class TileType { Int8, Bf16 };

// Bytes of a group of K in an unpacked column tile, and in an activation row.
template <TileType kType>
inline constexpr int kGroupBytes = kType == TileType::Int8 ? 512 : 1024;
template <TileType kType>
inline constexpr int kRowGroupBytes = kType == TileType::Int8 ? 32 : 64;

// Tiles 0 to 3 sum, 4 and 5 hold activations, 6 and 7 weights.
template <TileType kType>
inline TileConfig gemm_config(int rows) {
  TileConfig c;
  for (int t = 0; t < 4; t++) c.shape(t, rows, 64);
  for (int t = 4; t < 6; t++) c.shape(t, rows, kRowGroupBytes<kType>);
  for (int t = 6; t < 8; t++) c.shape(t, kType == TileType::Int8 ? 8 : 16, 64);
  return c;
}

// Sixteen columns by 4 of K as bytes, from a record's j-th pair of lines (packed.h), made signed.
template <Format kFormat>
inline I32 signed_codes(const uint8_t* line, bool high) {
  const I32 w = load_i(line);
  if constexpr (kFormat == Format::Q8_0) return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80));
  const I32 codes = high ? high_nibbles(w) : low_nibbles(w);
  return kFormat == Format::Q4_0 ? _mm512_sub_epi8(codes, _mm512_set1_epi8(8)) : codes;
}

// Bytes as integers in bf16: `pair` 0 takes the first two bytes of each lane, 1 the last two. An integer below 256 in
// magnitude is its float's upper half, exactly.
inline I32 bytes_to_bf16(I32 bytes, int pair) {
  const I32 even = _mm512_srai_epi32(_mm512_slli_epi32(bytes, pair ? 8 : 24), 24);
  const I32 odd = _mm512_srai_epi32(pair ? bytes : _mm512_slli_epi32(bytes, 16), 24);
  return _mm512_or_si512(_mm512_srli_epi32(bits(to_f(even)), 16),
                         _mm512_and_si512(bits(to_f(odd)), splat_i((int32_t)0xffff0000)));
}

template <TileType kType>
inline void store_codes(uint8_t* group, int j, I32 codes) {
  if constexpr (kType == TileType::Int8) {
    store_i(group + 64 * j, codes);
  } else {
    store_i(group + 128 * j, bytes_to_bf16(codes, 0));
    store_i(group + 128 * j + 64, bytes_to_bf16(codes, 1));
  }
}

// A panel's codes as two column tiles, each [groups][K rows of a tile][16 columns]; fetches `ahead` if not 0.
template <Format kFormat, TileType kType>
inline void unpack_panel(const uint8_t* panel, int groups, size_t ahead, uint8_t* out) {
  constexpr bool kEight = kFormat == Format::Q8_0;
  for (int g = 0; g < groups; g++, panel += record_bytes(kFormat)) {
    if (ahead)
      for (int line = 0; line < record_bytes(kFormat); line += 64) prefetch(panel + ahead + line);
    for (int tile = 0; tile < 2; tile++) {
      uint8_t* group = out + (size_t)(tile * groups + g) * kGroupBytes<kType>;
RL_UNROLL
      for (int j = 0; j < (kEight ? 8 : 4); j++) {
        const uint8_t* line = panel + 128 * j + 64 * tile;
        store_codes<kType>(group, j, signed_codes<kFormat>(line, false));
        if constexpr (!kEight) store_codes<kType>(group, 4 + j, signed_codes<kFormat>(line, true));
      }
    }
  }
}

// One block of up to 16 activation rows, ready for the tiles.
struct TileBlock {
  const uint8_t* codes;      // of its first row and group
  size_t row_stride;         // bytes
  size_t group_stride;       // bytes
  const float* scales;       // [groups][16]
  const float* scaled_sums;  // [groups][16]
  int row, rows;             // in the step
};

template <TileType kType, int C>
inline __attribute__((always_inline)) void start_group(const TileBlock& b, const uint8_t* tile, int g) {
  tile_zero<C>();
  tile_load<4 + C % 2>(b.codes + g * b.group_stride, b.row_stride);
  tile_load<6 + C % 2>(tile + (size_t)g * kGroupBytes<kType>, 64);
  if constexpr (kType == TileType::Int8) {
    tile_dot_s8<C, 4 + C % 2, 6 + C % 2>();
  } else {
    tile_dot_bf16<C, 4 + C % 2, 6 + C % 2>();
  }
}

using GroupSums = int32_t[256];  // [16 rows][16 columns], bf16's as the bits of fp32

template <TileType kType, int R>
inline __attribute__((always_inline)) void scale_group(F32 (&acc)[R], F32 weight_scales, const float* row_scales,
                                                       const GroupSums& sums) {
RL_UNROLL
  for (int r = 0; r < R; r++) {
    const F32 sum = kType == TileType::Int8 ? to_f(load_i(sums + 16 * r)) : load_f(sums + 16 * r);
    acc[r] = fma(sum, mul(weight_scales, splat(row_scales[r])), acc[r]);
  }
}

// Group g of the loop below, whose sums are in sums[C].
template <Format kFormat, TileType kType, int R, int C>
inline __attribute__((always_inline)) void group_turn(F32 (&acc)[R], const TileBlock& b, const uint8_t* tile,
                                                      const uint8_t* record, int groups, int g, GroupSums (&sums)[4]) {
  if (g + 3 < groups) start_group<kType, (C + 3) % 4>(b, tile, g + 3);
  if (g + 1 < groups) tile_store<(C + 1) % 4>(sums[(C + 1) % 4]);
  scale_group<kType, R>(acc, load_f16(record + (size_t)g * record_bytes(kFormat)), b.scales + 16 * g, sums[C]);
}

// out[r][0..16) of R rows (`stride` floats apart) by one column tile. `record` points at the first group's scales of
// these columns. The sums of a group pass through memory, the only way out of a tile: they are started three groups
// and stored one group before they are scaled.
template <Format kFormat, TileType kType, int R>
__attribute__((noinline)) void tile_columns(const TileBlock& b, const uint8_t* tile, const uint8_t* record, int groups,
                                            float* out, int stride) {
  constexpr bool kMinimum = kFormat == Format::Q4_1;
  alignas(64) GroupSums sums[4];
  F32 acc[R];
RL_UNROLL
  for (int r = 0; r < R; r++) acc[r] = zero_f();
  if constexpr (kMinimum) {  // first, while no tile competes for the vector units
    for (int g = 0; g < groups; g++) {
      const F32 minimum = load_f16(record + 64 + (size_t)g * record_bytes(kFormat));
RL_UNROLL
      for (int r = 0; r < R; r++) acc[r] = fma(minimum, splat(b.scaled_sums[16 * g + r]), acc[r]);
    }
RL_UNROLL
    for (int r = 0; r < R; r++) {
      store_f(out + r * stride, acc[r]);
      acc[r] = zero_f();
    }
  }
  tile_fence();
  start_group<kType, 0>(b, tile, 0);
  if (groups > 1) start_group<kType, 1>(b, tile, 1);
  if (groups > 2) start_group<kType, 2>(b, tile, 2);
  tile_store<0>(sums[0]);
  int g = 0;
  for (; g + 4 <= groups; g += 4) {
    group_turn<kFormat, kType, R, 0>(acc, b, tile, record, groups, g, sums);
    group_turn<kFormat, kType, R, 1>(acc, b, tile, record, groups, g + 1, sums);
    group_turn<kFormat, kType, R, 2>(acc, b, tile, record, groups, g + 2, sums);
    group_turn<kFormat, kType, R, 3>(acc, b, tile, record, groups, g + 3, sums);
  }
  if (g < groups) group_turn<kFormat, kType, R, 0>(acc, b, tile, record, groups, g, sums);
  if (g + 1 < groups) group_turn<kFormat, kType, R, 1>(acc, b, tile, record, groups, g + 1, sums);
  if (g + 2 < groups) group_turn<kFormat, kType, R, 2>(acc, b, tile, record, groups, g + 2, sums);
RL_UNROLL
  for (int r = 0; r < R; r++) {
    if constexpr (kMinimum) acc[r] = add(acc[r], load_f(out + r * stride));
    store_f(out + r * stride, acc[r]);
  }
}

}  // namespace ridgeline::RL_ISA
