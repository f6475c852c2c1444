#include "pack.h"

#include <algorithm>
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

PackedMatrix packed_layout(Format format, int n, int k) {
  if (n <= 0 || k <= 0) throw std::invalid_argument("a weight matrix needs at least one row and one column");
  if (is_quantized(format) && k % kGroup) throw std::invalid_argument("a quantized row must be a multiple of 32 long");
  if (format == Format::BF16 && k % 2) throw std::invalid_argument("a bf16 row must be even in length");
  PackedMatrix m;
  m.format = format;
  m.n = n;
  m.k = k;
  m.panel_bytes = is_quantized(format) ? (size_t)k / kGroup * record_bytes(format) : file_row_bytes(format, k) * kPanel;
  m.panel_bytes = round_up(m.panel_bytes, 64);
  return m;
}

size_t packed_bytes(const PackedMatrix& m) {
  return ((size_t)m.n + kPanel - 1) / kPanel * m.panel_bytes;
}

int pack(const std::vector<const uint8_t*>& rows, const PackedMatrix& m, uint8_t* out, Team& team) {
  const int panels = (m.n + kPanel - 1) / kPanel;
  std::atomic<int> bad{m.n};
  std::function<void(int)> job = [&](int) {
    team.share(0, panels, 2, [&](int begin, int end) {
      for (int n = begin * kPanel; n < std::min(end * kPanel, m.n); n++) {
        uint8_t* panel = out + (size_t)(n / kPanel) * m.panel_bytes;
        bool finite = is_quantized(m.format) ? pack_quantized(rows[(size_t)n], m, panel, n % kPanel)
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
