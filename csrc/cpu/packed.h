// How weights and quantized activations lie in memory: the contract between packing and kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline {

enum class Format : int32_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1 };

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
inline constexpr int code_bytes(Format f) { return f == Format::Q8_0 ? 1024 : 512; }  // of a group's record
inline constexpr int record_bytes(Format f) { return code_bytes(f) + (f == Format::Q4_1 ? 128 : 64); }

// A row of activations quantized to int8 per 32 of K: k codes, then per group fp32 scales, fp32
// scale * sum(codes), int32 sum(codes). Rows are padded to 64 bytes.
inline constexpr size_t q8_scales_at(int k) { return (size_t)k; }
inline constexpr size_t q8_scaled_sums_at(int k) { return (size_t)k + (size_t)k / kGroup * 4; }
inline constexpr size_t q8_sums_at(int k) { return (size_t)k + (size_t)k / kGroup * 8; }

}  // namespace ridgeline
