// How weights and quantized activations lie in memory: the contract between packing and kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline {

// T8 and T4 are no file's: what Q8_0, and Q4_0 and Q4_1, become where a processor multiplies tiles (AMX).
enum class Format : int32_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1, T8, T4 };

inline constexpr int kTile = 16;   // output columns side by side in one vector's lanes
inline constexpr int kPanel = 32;  // output columns stored together: a pair of tiles, a and b
inline constexpr int kGroup = 32;  // weights along K that share a scale

// A packed matrix is a row of panels, each 32 output columns by all of K, read from front to back: one
// sequential stream, which is what a core's prefetchers follow best.
//
// Quantized panel: per group of K a record of codes, scales and (if the format has them) minima.
//   codes, 4 bits: 4 times 64 bytes of tile a and 64 of tile b; the j-th holds at byte 4*c + i in its low
//     nibble column c at k = 4j + i and in its high nibble column c at k = 16 + 4j + i.
//   codes, 8 bits: 8 times the same; the j-th holds column c at k = 4j + i, biased by 128.
//   scales, minima: 32 fp16 each.
// Tile panel: per group of K a record of tile a's codes, tile b's and 32 scales; then T4's minima; then for each column
// the fp32 power of two that its sums are multiplied by.
//   codes: 64 bytes hold for each column 4 bytes of the file's group, so T8 (biased by 128) has 8 such lines and T4 4.
//     What K a place belongs to is then another matter: tile_order() has the order that activations are brought into.
//   scales: fp16, times a power of two so that a column's greatest is around 16 to 32. T4's are positive: the codes of
//     a negative one are turned round (q -> 15 - q).
//   minima, of 32 groups each for tile a and for b: bf16 as a tile takes them, [16][column][2 groups], times the same
//     power of two and 2^-112, the exponent that codes get from fp16 bits moved right by three places.
// Float panel: fp32 and fp16 per k 32 values; bf16 per pair of k 16 pairs of tile a, 16 of tile b.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  Format format = Format::F32;
  int32_t n = 0;  // output columns
  int32_t k = 0;
  size_t panel_bytes = 0;
};

inline constexpr size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }
inline constexpr bool is_quantized(Format f) { return f >= Format::Q8_0; }
inline constexpr bool is_tiled(Format f) { return f >= Format::T8; }
inline constexpr int code_bytes(Format f) { return f == Format::Q8_0 ? 1024 : 512; }  // of a group's record
inline constexpr int record_bytes(Format f) { return code_bytes(f) + (f == Format::Q4_1 ? 128 : 64); }

inline constexpr int tile_codes(Format f) { return f == Format::T8 ? 512 : 256; }  // bytes of a group, one column tile
inline constexpr int tile_record(Format f) { return 2 * tile_codes(f) + 64; }
inline constexpr int kMinimaGroups = 32;  // whose minima fill one tile
inline constexpr int kTileBytes = 1024;   // 16 rows of 64 bytes
inline constexpr int minima_tiles(Format f, int groups) {
  return f == Format::T4 ? (groups + kMinimaGroups - 1) / kMinimaGroups : 0;
}
inline constexpr size_t minima_at(Format f, int groups) { return (size_t)groups * tile_record(f); }
inline constexpr size_t column_scales_at(Format f, int groups) {
  return minima_at(f, groups) + (size_t)minima_tiles(f, groups) * 2 * kTileBytes;
}
inline constexpr int kMaxTiledK = 53248;              // 16 rows of activations fit a thread's scratch memory
inline constexpr int kTileRaise = 96;               // activations come times 2^96,
inline constexpr int kTileShift = kTileRaise - 112;  // codes and minima times 2^-112

// Which of a group's 32 K the i-th place of a tile's K holds: a row of weights is a pair of places for each column.
inline constexpr int tile_order(Format f, int i) {
  const int row = i / 2, word = i % 2;
  if (f == Format::T8) return 4 * (row / 2) + row % 2 + 2 * word;
  return 4 * (row / 4) + row % 4 / 2 + row % 2 * 16 + 2 * word;
}

// Activations quantized to int8 per 32 of K: a row is its groups one after the other, padded to 64 bytes.
//
// Codes are at least kLeastCode, at most kMostCode: a group's greatest magnitude is made positive by the sign of its scale,
// and where one of the other sign comes within an eighth of it, the scale grows until that fits. So the sum of a code and
// a 4-bit weight still fits a byte, which gemm_paired.h multiplies.
struct Q8Group {
  int8_t codes[kGroup];
  float scale;
  float scaled_sum;  // scale * sum
  int32_t sum;       // of the codes
  int32_t paired;    // -sum(a b + kSecondBias a + kFirstBias b) over the pairs that gemm_paired.h multiplies, or 0 where
                     // there is no such kernel: a of the first kPairedWords words, b 16 codes on
};
static_assert(sizeof(Q8Group) == 48);  // graph/ir.py counts on it
inline constexpr int kLeastCode = -112, kMostCode = 127;
inline constexpr int kPairedWords = 3;  // of a group's 4 (codes 4 j to 4 j + 3 with codes 16 + 4 j on)
// Added to the weights that are added to a (those of b, high nibbles), and to the others: sums fit an unsigned byte and a
// signed one.
inline constexpr int kFirstBias = 112, kSecondBias = -16, kMostWeight = 15;
static_assert(kLeastCode + kFirstBias >= 0 && kMostCode + kMostWeight + kFirstBias <= 255);
static_assert(kLeastCode + kSecondBias >= -128 && kMostCode + kMostWeight + kSecondBias <= 127);

}  // namespace ridgeline
