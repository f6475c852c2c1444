#include "pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace ridgeline {
namespace {

bool finite_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }
bool finite_bf16(uint16_t h) { return (h & 0x7f80) != 0x7f80; }
bool finite_f32(uint32_t b) { return (b & 0x7f800000) != 0x7f800000; }

template <class T>
T read(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
void write(uint8_t* p, T x) {
  std::memcpy(p, &x, sizeof x);
}

// One row into column `c` of a quantized panel. The files' nibble order is the panel's: byte i of a group
// holds k = i and k = 16 + i, so codes move as whole 32-bit words. False if a scale is not finite.
bool pack_quantized(const uint8_t* row, const PackedMatrix& m, uint8_t* panel, int c) {
  const bool eight = m.format == Format::Q8_0, minimum = m.format == Format::Q4_1;
  const int words = eight ? 8 : 4, header = minimum ? 4 : 2, group_bytes = header + 4 * words;
  const uint32_t bias = eight ? 0x80808080u : 0;
  bool finite = true;
  for (int g = 0; g < m.k / kGroup; g++, row += group_bytes, panel += record_bytes(m.format)) {
    uint8_t* scales = panel + code_bytes(m.format) + 2 * c;
    uint16_t scale = read<uint16_t>(row);
    finite &= finite_f16(scale);
    write(scales, scale);
    if (minimum) {
      uint16_t low = read<uint16_t>(row + 2);
      finite &= finite_f16(low);
      write(scales + 64, low);
    }
    for (int j = 0; j < words; j++) write(panel + 128 * j + 4 * c, read<uint32_t>(row + header + 4 * j) ^ bias);
  }
  return finite;
}

// A half as a float; what it is not exact for (infinity, NaN) is refused elsewhere.
float from_half(uint16_t h) {
  const float magnitude = h & 0x7c00 ? std::bit_cast<float>(((uint32_t)(h & 0x7fff) << 13) + (112u << 23))
                                     : (float)(h & 0x3ff) * 0x1p-24f;
  return h & 0x8000 ? -magnitude : magnitude;
}
// A half's value times a power of two, as a half again.
uint16_t to_half(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude >= 113u << 23) return (uint16_t)(sign | ((magnitude - (112u << 23)) >> 13));
  return (uint16_t)(sign | (uint32_t)(std::bit_cast<float>(magnitude) * 0x1p24f + 0.5f));
}
// x * 2^-112 rounded to bf16; what is too small for a tile product is 0.
uint16_t to_tile_bf16(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x), magnitude = b & 0x7fffffff;
  const uint32_t rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
  return rounded < 113u << 7 ? 0 : (uint16_t)((b >> 16 & 0x8000) | (rounded - (112u << 7)));
}

// Scale and minimum of a file's group as T4 has them, the scale positive.
struct ScaleAndMinimum {
  float scale, minimum;
  bool turned;  // codes count down
};
ScaleAndMinimum t4_of(const uint8_t* group, Format from) {
  float scale = from_half(read<uint16_t>(group));
  float minimum = from == Format::Q4_0 ? -8 * scale : from_half(read<uint16_t>(group + 2));
  if (scale >= 0) return {scale, minimum, false};
  return {-scale, minimum + 15 * scale, true};
}

// One row of format `from` into column `c` of a tile panel. False if a scale is not finite.
bool pack_tiled(const uint8_t* row, Format from, const PackedMatrix& m, uint8_t* panel, int c) {
  const bool eight = m.format == Format::T8;
  const int groups = m.k / kGroup, header = from == Format::Q4_1 ? 4 : 2, words = eight ? 8 : 4;
  const int group_bytes = header + 4 * words, lane = c % kTile, tile = c / kTile;
  bool finite = true;
  float top = 0;
  for (int g = 0; g < groups; g++) {
    const uint8_t* group = row + g * group_bytes;
    finite &= finite_f16(read<uint16_t>(group)) && (header == 2 || finite_f16(read<uint16_t>(group + 2)));
    if (eight) {
      top = std::max(top, 16 * std::abs(from_half(read<uint16_t>(group))));
    } else {
      const ScaleAndMinimum t = t4_of(group, from);
      top = std::max({top, 16 * t.scale, std::abs(t.minimum)});
    }
  }
  const int shift = top > 0 && finite ? 9 - std::ilogb(top) - 1 : 0;  // top becomes 256 to 512
  const float factor = std::ldexp(1.0f, shift);
  write(panel + column_scales_at(m.format, groups) + 4 * c, std::ldexp(1.0f, -kTileShift - shift));
  for (int g = 0; g < groups; g++, row += group_bytes) {
    uint8_t* record = panel + (size_t)g * tile_record(m.format);
    uint32_t turn = eight ? 0x80808080u : 0;
    float scale = eight ? from_half(read<uint16_t>(row)) : 0;
    if (!eight) {
      const ScaleAndMinimum t = t4_of(row, from);
      scale = t.scale;
      turn = t.turned ? 0xffffffffu : 0;
      uint8_t* minima = panel + minima_at(m.format, groups) + (size_t)(g / kMinimaGroups * 2 + tile) * kTileBytes;
      write(minima + g % kMinimaGroups / 2 * 64 + 4 * lane + 2 * (g % 2), to_tile_bf16(t.minimum * factor));
    }
    write(record + 2 * tile_codes(m.format) + 2 * c, to_half(scale * factor));
    for (int j = 0; j < words; j++)
      write(record + tile * tile_codes(m.format) + 64 * j + 4 * lane, read<uint32_t>(row + header + 4 * j) ^ turn);
  }
  return finite;
}

bool pack_float(const uint8_t* row, const PackedMatrix& m, uint8_t* panel, int c) {
  bool finite = true;
  for (int k = 0; k < m.k; k++) {
    if (m.format == Format::F32) {
      uint32_t x = read<uint32_t>(row + 4 * (size_t)k);
      finite &= finite_f32(x);
      write(panel + 128 * (size_t)k + 4 * c, x);
    } else {
      uint16_t x = read<uint16_t>(row + 2 * (size_t)k);
      bool half = m.format == Format::F16;
      finite &= half ? finite_f16(x) : finite_bf16(x);
      write(half ? panel + 64 * (size_t)k + 2 * c : panel + 128 * (size_t)(k / 2) + 4 * c + 2 * (k % 2), x);
    }
  }
  return finite;
}

}  // namespace

size_t file_row_bytes(Format format, int k) {
  size_t n = (size_t)k;
  switch (format) {
    case Format::F32: return 4 * n;
    case Format::F16:
    case Format::BF16: return 2 * n;
    case Format::Q8_0: return n / kGroup * 34;
    case Format::Q4_0: return n / kGroup * 18;
    default: return n / kGroup * 20;
  }
}

Format packed_format(Format file, bool tiles) {
  if (!tiles || !is_quantized(file)) return file;
  return file == Format::Q8_0 ? Format::T8 : Format::T4;
}

PackedMatrix packed_layout(Format format, int n, int k) {
  if (n <= 0 || k <= 0) throw std::invalid_argument("a weight matrix needs at least one row and one column");
  if (is_quantized(format) && k % kGroup) throw std::invalid_argument("a quantized row must be a multiple of 32 long");
  if (format == Format::BF16 && k % 2) throw std::invalid_argument("a bf16 row must be even in length");
  PackedMatrix m;
  m.format = format;
  m.n = n;
  m.k = k;
  if (is_tiled(format) && k > kMaxTiledK) throw std::invalid_argument("a quantized row of more than 53,248 is too long");
  m.panel_bytes = is_tiled(format)       ? column_scales_at(format, k / kGroup) + 4 * kPanel
                  : is_quantized(format) ? (size_t)k / kGroup * record_bytes(format) : file_row_bytes(format, k) * kPanel;
  m.panel_bytes = round_up(m.panel_bytes, 64);
  return m;
}

size_t packed_bytes(const PackedMatrix& m) {
  return ((size_t)m.n + kPanel - 1) / kPanel * m.panel_bytes;
}

int pack(const std::vector<const uint8_t*>& rows, Format from, const PackedMatrix& m, uint8_t* out, Team& team) {
  const int panels = (m.n + kPanel - 1) / kPanel;
  std::atomic<int> bad{m.n};
  std::function<void(int)> job = [&](int) {
    team.share(panels, 2, [&](int begin, int end) {
      for (int n = begin * kPanel; n < std::min(end * kPanel, m.n); n++) {
        uint8_t* panel = out + (size_t)(n / kPanel) * m.panel_bytes;
        bool finite = is_tiled(m.format)       ? pack_tiled(rows[(size_t)n], from, m, panel, n % kPanel)
                      : is_quantized(m.format) ? pack_quantized(rows[(size_t)n], m, panel, n % kPanel)
                                             : pack_float(rows[(size_t)n], m, panel, n % kPanel);
        for (int seen = bad.load(); !finite && n < seen && !bad.compare_exchange_weak(seen, n);) {
        }
      }
    });
  };
  team.run(job);
  return bad.load() == m.n ? -1 : bad.load();
}

}  // namespace ridgeline
