// How weights and quantized activations lie in memory: the contract between packing and kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline {

enum class Format : int32_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1 };

inline constexpr int kTile = 16;   // output columns side by side in one vector's lanes
inline constexpr int kGroup = 32;  // weights along K that share a scale

// A packed matrix is a row of tiles, each 16 output columns by all of K, cache-line aligned.
//
// Quantized tile: codes, then scales, then minima.
//   codes, 4 bits: per group 4 records of 64 bytes; record j, byte 4*c + i holds in its low nibble
//     column c at k = 4j + i and in its high nibble column c at k = 16 + 4j + i.
//   codes, 8 bits: per group 8 records; record j, byte 4*c + i is column c at k = 4j + i, biased by 128.
//   scales, minima: per group 16 fp16.
// Float tile: fp32 and fp16 per k 16 values; bf16 per pair of k 16 pairs.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  Format format = Format::F32;
  int32_t n = 0;          // output columns, a multiple of 16 once padded
  int32_t k = 0;
  size_t tile_bytes = 0;  // distance between tiles
  size_t scales_at = 0;   // offset of the scales in a tile
  size_t minima_at = 0;   // offset of the minima in a tile
};

inline constexpr size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }
inline constexpr bool is_quantized(Format f) { return f >= Format::Q8_0; }
inline constexpr int code_bytes_per_group(Format f) { return f == Format::Q8_0 ? 512 : 256; }

// A row of activations quantized to int8 per 32 of K: k codes, then per group fp32 scales, fp32
// scale * sum(codes), int32 sum(codes). Rows are padded to 64 bytes.
inline constexpr size_t q8_scales_at(int k) { return (size_t)k; }
inline constexpr size_t q8_scaled_sums_at(int k) { return (size_t)k + (size_t)k / kGroup * 4; }
inline constexpr size_t q8_sums_at(int k) { return (size_t)k + (size_t)k / kGroup * 8; }

}  // namespace ridgeline
