// The matrix product on tile registers: bf16 activations by weights unpacked to bf16, up to 32 rows by a panel at a time.
//
// A tile product sums 32 of K for each element in one fixed order and adds the sum to what there is, so a row's result
// depends on neither the rows beside it nor their number: one row takes the same instructions as 512. What a group of
// weights is scaled by is multiplied into the weights, not into the sums: a scale for every 32 of K would cost more
// vector operations than a tile product takes time.
//
// Unpacking takes three and a quarter operations for 32 four-bit weights, each of which either vector port can do:
//   (w & 15) | 0x6400           the half 1024 + q
//   fma(that, d, -1024 d)       q * d, rounded once
//   mulhrs(bits, 2^12)          a half's bits moved right by 3, rounded: a bf16 of 8 bits, times 2^-112
// Activations are multiplied by 2^96 to make up for that exponent (packed.h), a column's sums by a last power of two.
#pragma once

#include "isa/isa.h"
#include "kernels/fetch.h"
#include "packed.h"

namespace ridgeline::RL_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileRow = 64;  // bytes: 32 of K
inline constexpr int kRing = 4;      // groups of a panel that are kept unpacked when no further rows want them
inline constexpr int kPartGroups = 9;  // that are kept for further rows: they and what 32 rows read fit the first level
inline constexpr size_t kGroupTiles = 2 * kTileBytes;  // a group of a panel unpacked: tiles a and b

// Tiles 0 to 3 sum (rows 0 to 15 by columns a and b, then rows 16 to 31), 4 and 5 hold activations, 6 and 7 weights.
inline TileConfig gemm_config(int rows) {
  TileConfig c;
  for (int half = 0; half < 2; half++) {
    const int some = half == 0 ? (rows < kTileRows ? rows : kTileRows) : rows - kTileRows;
    if (some <= 0) break;
    c.shape(2 * half, some, kTileRow);
    c.shape(2 * half + 1, some, kTileRow);
    c.shape(4 + half, some, kTileRow);
  }
  c.shape(6, kTileRows, kTileRow);
  c.shape(7, kTileRows, kTileRow);
  return c;
}

inline constexpr int kAndOr = 0xea, kOrAnd = 0xf8;  // (a & b) | c, a | (b & c)

inline __attribute__((always_inline)) I32 half_to_bf16(__m512h x) {
  return _mm512_mulhrs_epi16((__m512i)x, _mm512_set1_epi16(1 << 12));
}

// One group of one column tile: 16 rows of 16 columns by a pair of K, ready to be loaded.
template <Format kFormat>
inline __attribute__((always_inline)) void unpack_group(const uint8_t* codes, const uint8_t* scales, uint8_t* out) {
  const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                         4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)scales));
  const __m512h d = (__m512h)_mm512_permutexvar_epi16(twice, packed);
  const __m512i thousand = _mm512_set1_epi16(0x6400);  // as a half, 1024
  if constexpr (kFormat == Format::T4) {
    const __m512i low = _mm512_set1_epi16(0xf), high = _mm512_set1_epi16(0xf0);
    const __m512h d16 = _mm512_mul_ph(d, _mm512_set1_ph((_Float16)0.0625f));
    const __m512h less = _mm512_mul_ph(d, _mm512_set1_ph((_Float16)-1024.0f));
    const __m512h less16 = _mm512_mul_ph(d, _mm512_set1_ph((_Float16)-64.0f));
RL_UNROLL
    for (int j = 0; j < 4; j++) {
      const __m512i w = load_i(codes + 64 * j), v = _mm512_srli_epi16(w, 8);
      auto put = [&](int i, __m512i from, __m512i mask, __m512h by, __m512h minus) {
        const __m512h code = (__m512h)_mm512_ternarylogic_epi32(from, mask, thousand, kAndOr);
        store_i(out + 64 * (4 * j + i), half_to_bf16(_mm512_fmadd_ph(code, by, minus)));
      };
      put(0, w, low, d, less);
      put(1, w, high, d16, less16);
      put(2, v, low, d, less);
      put(3, v, high, d16, less16);
    }
  } else {
    const __m512i byte = _mm512_set1_epi16(0xff);
    const __m512i in_place = _mm512_set1_epi16((short)0x8fff);  // moving right has spread a sign over four bits
    const __m512h zero = _mm512_set1_ph((_Float16)1152.0f);  // 1024 and the codes' bias
RL_UNROLL
    for (int j = 0; j < 8; j++) {
      const __m512i w = load_i(codes + 64 * j);
RL_UNROLL
      for (int i = 0; i < 2; i++) {
        const __m512i code = i == 0 ? _mm512_ternarylogic_epi32(w, byte, thousand, kAndOr)
                                    : _mm512_or_si512(_mm512_srli_epi16(w, 8), thousand);
        const __m512h h = _mm512_mul_ph(_mm512_sub_ph((__m512h)code, zero), d);
        store_i(out + 64 * (2 * j + i), _mm512_and_si512(half_to_bf16(h), in_place));
      }
    }
  }
}

// Up to 32 rows of activations by one panel.
inline constexpr int kTileLines = 8;  // of the cache, fetched with each group of K

struct TileProduct {
  const uint8_t* x;        // [blocks of 16 rows][tiles of K][rows][64 bytes], then the sums of groups if there are minima
  size_t x_tile, x_block;  // bytes of a tile and of a block's tiles
  const uint8_t* panel;
  uint8_t* unpacked;       // room for kPartGroups groups; not used for bf16
  bool ring;               // of kRing groups, for a product of all groups; else [begin, end) are a part
  int groups, begin, end;
  const uint8_t* next;     // as many bytes as a panel has are fetched from here: weights that are wanted soon
  size_t next_bytes;       // of a panel
  Runs elsewhere;          // fetched as well
  float (*sums)[256];      // out: four tiles of 16 by 16, as many as there are rows for; a later part adds to them
};

// The product of the group at `weights`, whose two tiles lie `apart` bytes apart, rows `stride` bytes.
template <int kBlocks>
inline __attribute__((always_inline)) void add_products(const uint8_t* x, size_t x_block, const uint8_t* weights,
                                                        size_t apart, size_t stride) {
  tile_load<4>(x, kTileRow);
  tile_load<6>(weights, stride);
  tile_dot_bf16<0, 4, 6>();
  tile_load<7>(weights + apart, stride);
  tile_dot_bf16<1, 4, 7>();
  if constexpr (kBlocks == 2) {
    tile_load<5>(x + x_block, kTileRow);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
}

// Fetches the next group's activations: many rows' come from the second-level cache, whose latency two tiles of products
// do not hide. All at once and before the products; between them it gains nothing.
template <int kBlocks>
inline __attribute__((always_inline)) void fetch_tiles(const uint8_t* x, size_t x_block) {
RL_UNROLL
  for (int line = 0; line < kTileBytes; line += 64) {
    prefetch(x + line);
    if constexpr (kBlocks == 2) prefetch(x + x_block + line);
  }
}

// Zeros and the minima of all groups, or what the parts before have left. A minimum multiplies the sum of its group's
// activations, which is two bf16: the sum rounded, and what that leaves.
template <Format kFormat, int kBlocks>
inline __attribute__((always_inline)) void start_sums(const TileProduct& p) {
  if (p.begin > 0) {
    tile_load<0>(p.sums[0], 64), tile_load<1>(p.sums[1], 64);
    if constexpr (kBlocks == 2) tile_load<2>(p.sums[2], 64), tile_load<3>(p.sums[3], 64);
    return;
  }
  tile_zero<0>(), tile_zero<1>();
  if constexpr (kBlocks == 2) tile_zero<2>(), tile_zero<3>();
  const uint8_t *minima = p.panel + minima_at(kFormat, p.groups), *sums = p.x + (size_t)p.groups * p.x_tile;
  for (int i = 0; i < minima_tiles(kFormat, p.groups); i++, minima += kGroupTiles, sums += 2 * p.x_tile) {
    add_products<kBlocks>(sums, p.x_block, minima, kTileBytes, 64);
    add_products<kBlocks>(sums + p.x_tile, p.x_block, minima, kTileBytes, 64);
  }
}

// `kUnpack`: the panel's first rows, which unpack it on the way; bf16 needs no unpacking, only fetching.
template <Format kFormat, int kBlocks, bool kUnpack>
__attribute__((noinline)) void tile_product(const TileProduct& p) {
  constexpr bool kPacked = is_tiled(kFormat);
  constexpr int kRecord = kPacked ? tile_record(kFormat) : (int)kGroupTiles, kCodes = tile_codes(kFormat);
  constexpr int kLag = kPacked && kUnpack ? 2 : 0;  // groups from storing an unpacked tile to loading it
  const size_t groups = (size_t)p.groups, begin = (size_t)p.begin, end = (size_t)p.end;
  start_sums<kFormat, kBlocks>(p);
  // What lies behind a panel's records is fetched with them.
  Fetcher fetcher(p.elsewhere);
  const uint8_t* rest = p.next + groups * kRecord;
  const size_t rest_lines = ((p.next_bytes - groups * kRecord) / 64 + groups - 1) / groups;
  auto slot = [&](size_t g) { return p.unpacked + (p.ring ? g % kRing : g - begin) * kGroupTiles; };
  for (size_t g = begin; g < end + kLag; g++) {
    if (kUnpack && g < end) {
      const uint8_t* record = p.panel + g * kRecord;
RL_UNROLL
      for (int line = 0; line < kRecord; line += 64) prefetch_second(p.next + g * kRecord + line);
      for (size_t line = 0; line < rest_lines; line++) prefetch_second(rest + (g * rest_lines + line) * 64);
      if constexpr (kPacked) {
        uint8_t* to = slot(g);
        unpack_group<kFormat>(record, record + 2 * kCodes, to);
        unpack_group<kFormat>(record + kCodes, record + 2 * kCodes + 32, to + kTileBytes);
      }
    }
    fetcher.fetch<kTileLines>();
    tile_fence();
    if (g < begin + kLag) continue;
    const size_t h = g - kLag;
    const uint8_t* x = p.x + h * p.x_tile;
    if constexpr (!kUnpack) fetch_tiles<kBlocks>(x + p.x_tile, p.x_block);
    if constexpr (kPacked) {
      add_products<kBlocks>(x, p.x_block, slot(h), kTileBytes, 64);
    } else {
      add_products<kBlocks>(x, p.x_block, p.panel + h * kRecord, 64, 128);
    }
  }
  tile_store<0>(p.sums[0]), tile_store<1>(p.sums[1]);
  if constexpr (kBlocks == 2) tile_store<2>(p.sums[2]), tile_store<3>(p.sums[3]);
}

}  // namespace ridgeline::RL_ISA
