// The integer matrix product on tile registers: up to 16 rows of activations by 16 columns of weights at a time.
//
// Bit for bit what gemm_q8.h computes: the products of a group are summed exactly, scaling, its order and the
// separate chain of minima are the same. (A tile product takes a cycle a row whether it sums 32 or 64 bytes of K, so
// bf16 tiles, with every code an integer that bf16 holds exactly, would save the conversion; measured no faster.)
#pragma once

#include "isa/isa.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kGroupBytes = 512;  // of a group of K in an unpacked column tile: 8 rows of 16 columns by 4 of K

// Tiles 0 to 3 sum, 4 and 5 hold activations, 6 and 7 weights.
inline TileConfig gemm_config(int rows) {
  TileConfig c;
  for (int t = 0; t < 4; t++) c.shape(t, rows, 64);
  for (int t = 4; t < 6; t++) c.shape(t, rows, kGroup);
  for (int t = 6; t < 8; t++) c.shape(t, kGroup / 4, 64);
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

// A panel's codes as two column tiles, each [groups][8][16 columns][4 of K].
template <Format kFormat>
inline void unpack_panel(const uint8_t* panel, int groups, uint8_t* out) {
  constexpr bool kEight = kFormat == Format::Q8_0;
  for (int g = 0; g < groups; g++, panel += record_bytes(kFormat)) {
    for (int tile = 0; tile < 2; tile++) {
      uint8_t* group = out + (size_t)(tile * groups + g) * kGroupBytes;
RL_UNROLL
      for (int j = 0; j < (kEight ? 8 : 4); j++) {
        const uint8_t* line = panel + 128 * j + 64 * tile;
        store_i(group + 64 * j, signed_codes<kFormat>(line, false));
        if constexpr (!kEight) store_i(group + 64 * (4 + j), signed_codes<kFormat>(line, true));
      }
    }
  }
}

// One block of up to 16 activation rows, ready for the tiles.
struct TileBlock {
  const uint8_t* codes;      // of its first row
  size_t row_stride;         // bytes
  const float* scales;       // [groups][16]
  const float* scaled_sums;  // [groups][16]
  int row, rows;             // in the step
};

template <int C>
inline __attribute__((always_inline)) void start_group(const TileBlock& b, const uint8_t* tile, int g) {
  tile_zero<C>();
  tile_load<4 + C % 2>(b.codes + g * kGroup, b.row_stride);
  tile_load<6 + C % 2>(tile + g * kGroupBytes, 64);
  tile_dot_s8<C, 4 + C % 2, 6 + C % 2>();
}

using GroupSums = int32_t[256];  // [16 rows][16 columns]

// The kPart-th quarter of a block's rows.
template <int kPart, int R>
inline __attribute__((always_inline)) void scale_rows(F32 (&acc)[R], F32 weight_scales, const float* row_scales,
                                                      const GroupSums& sums) {
RL_UNROLL
  for (int r = R * kPart / 4; r < R * (kPart + 1) / 4; r++)
    acc[r] = fma(to_f(load_i(sums + 16 * r)), mul(weight_scales, splat(row_scales[r])), acc[r]);
}

// What is fetched into the cache while a product runs: with each group of K some lines, `stride` bytes further on.
struct Fetch {
  const uint8_t* at = nullptr;
  int lines = 0, stride = 0;
};

// Group g of the loop below, whose sums are in sums[C]. Its vector work lies in quarters between the tile instructions:
// a core that shares its tile unit with another virtual processor is a quarter faster so, any other as fast.
template <Format kFormat, int R, int C>
inline __attribute__((always_inline)) void group_turn(F32 (&acc)[R], const TileBlock& b, const uint8_t* tile,
                                                      const uint8_t* record, int groups, int g, GroupSums (&sums)[4],
                                                      const Fetch& fetch) {
  constexpr int kNext = (C + 3) % 4;
  const F32 weight_scales = load_f16(record + (size_t)g * record_bytes(kFormat));
  const float* row_scales = b.scales + 16 * g;
  const bool more = g + 3 < groups;
  for (int line = 0; line < fetch.lines; line++) prefetch(fetch.at + (size_t)g * fetch.stride + 64 * line);
  if (more) {
    tile_zero<kNext>();
    tile_load<4 + kNext % 2>(b.codes + (g + 3) * kGroup, b.row_stride);
  }
  scale_rows<0>(acc, weight_scales, row_scales, sums[C]);
  if (more) tile_load<6 + kNext % 2>(tile + (g + 3) * kGroupBytes, 64);
  scale_rows<1>(acc, weight_scales, row_scales, sums[C]);
  if (more) tile_dot_s8<kNext, 4 + kNext % 2, 6 + kNext % 2>();
  scale_rows<2>(acc, weight_scales, row_scales, sums[C]);
  if (g + 1 < groups) tile_store<(C + 1) % 4>(sums[(C + 1) % 4]);
  scale_rows<3>(acc, weight_scales, row_scales, sums[C]);
}

// out[r][0..32) = the chain of minima of eight rows from `row` on by both column tiles of a panel; rows past a block's
// last give numbers nobody reads. Apart from the tiles, whose loop has no registers for it.
inline void minima_columns(const TileBlock& b, int row, const uint8_t* minima, int groups, size_t record_stride,
                           float* out, int stride) {
  constexpr int kRowsAtOnce = 8;
  F32 acc[kRowsAtOnce][2];
RL_UNROLL
  for (int r = 0; r < kRowsAtOnce; r++) acc[r][0] = acc[r][1] = zero_f();
  const float* sums = b.scaled_sums + row;
  for (int g = 0; g < groups; g++, minima += record_stride, sums += kTileRows) {
    const F32 low = load_f16(minima), high = load_f16(minima + 32);
RL_UNROLL
    for (int r = 0; r < kRowsAtOnce; r++) {
      const F32 t = splat(sums[r]);
      acc[r][0] = fma(low, t, acc[r][0]);
      acc[r][1] = fma(high, t, acc[r][1]);
    }
  }
RL_UNROLL
  for (int r = 0; r < kRowsAtOnce; r++) {
    store_f(out + r * stride, acc[r][0]);
    store_f(out + r * stride + kTile, acc[r][1]);
  }
}

// out[r][0..16) of R rows (`stride` floats apart) by one column tile, plus what is there for formats with a minimum.
// `record` points at the first group's scales of these columns. The sums of a group pass through memory, the only way
// out of a tile: they are started three groups and stored one group before they are scaled. (A tile's store takes 15
// cycles beside which little else starts; the three vector operations of each row come on top.)
template <Format kFormat, int R>
__attribute__((noinline)) void tile_columns(const TileBlock& b, const uint8_t* tile, const uint8_t* record, int groups,
                                            float* out, int stride, const Fetch& fetch) {
  constexpr bool kMinimum = kFormat == Format::Q4_1;
  alignas(64) GroupSums sums[4];
  F32 acc[R];
RL_UNROLL
  for (int r = 0; r < R; r++) acc[r] = zero_f();
  tile_fence();
  start_group<0>(b, tile, 0);
  if (groups > 1) start_group<1>(b, tile, 1);
  if (groups > 2) start_group<2>(b, tile, 2);
  tile_store<0>(sums[0]);
  int g = 0;
  for (; g + 4 <= groups; g += 4) {
    group_turn<kFormat, R, 0>(acc, b, tile, record, groups, g, sums, fetch);
    group_turn<kFormat, R, 1>(acc, b, tile, record, groups, g + 1, sums, fetch);
    group_turn<kFormat, R, 2>(acc, b, tile, record, groups, g + 2, sums, fetch);
    group_turn<kFormat, R, 3>(acc, b, tile, record, groups, g + 3, sums, fetch);
  }
  if (g < groups) group_turn<kFormat, R, 0>(acc, b, tile, record, groups, g, sums, fetch);
  if (g + 1 < groups) group_turn<kFormat, R, 1>(acc, b, tile, record, groups, g + 1, sums, fetch);
  if (g + 2 < groups) group_turn<kFormat, R, 2>(acc, b, tile, record, groups, g + 2, sums, fetch);
RL_UNROLL
  for (int r = 0; r < R; r++) {
    if constexpr (kMinimum) acc[r] = add(acc[r], load_f(out + r * stride));
    store_f(out + r * stride, acc[r]);
  }
}

}  // namespace ridgeline::RL_ISA
