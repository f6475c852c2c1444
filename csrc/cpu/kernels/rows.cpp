// Operators that work a row at a time: embedding, RMSNorm, activation quantization, elementwise, copies.
// Each is bound by memory; a thread always has the same rows, and a row's arithmetic is one fixed order.
#include <cmath>
#include <cstring>

#include "kernels/quantize.h"
#include "kernels/table.h"

namespace ridgeline::RL_ISA {
namespace {

float half_at(const uint8_t* panel, int column) {
  float lanes[16];
  store_f(lanes, load_f16(panel + column / kTile * 32));
  return lanes[column % kTile];
}

// Column `column` of a panel at k.
float weight_at(const PackedMatrix& w, const uint8_t* panel, int column, int k) {
  int in_group = k % kGroup;
  const uint8_t* record = panel + (size_t)(k / kGroup) * record_bytes(w.format);
  const uint8_t* scales = record + code_bytes(w.format);
  switch (w.format) {
    case Format::F32:
      return ((const float*)panel)[(size_t)k * kPanel + column];
    case Format::F16:
      return half_at(panel + (size_t)k * 64, column);
    case Format::BF16: {
      uint32_t bits = (uint32_t)((const uint16_t*)panel)[(size_t)(k / 2) * 64 + 2 * column + k % 2] << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    case Format::T8: {
      const uint8_t* tiles = panel + (size_t)(k / kGroup) * tile_record(w.format);
      const int tile = column / kTile;
      const int code = tiles[tile * tile_codes(w.format) + in_group / 4 * 64 + column % kTile * 4 + in_group % 4];
      return half_at(tiles + 2 * tile_codes(w.format), column) * (float)(code - 128);  // times row_factor
    }
    case Format::Q8_0: {
      int code = record[in_group / 4 * 128 + 4 * column + in_group % 4];
      return half_at(scales, column) * (float)(code - 128);
    }
    default: {
      int byte = record[in_group % 16 / 4 * 128 + 4 * column + in_group % 4];
      int code = in_group < 16 ? byte & 15 : byte >> 4;
      float scale = half_at(scales, column);
      return w.format == Format::Q4_0 ? scale * (float)(code - 8) : scale * (float)code + half_at(scales + 64, column);
    }
  }
}

// What a row's numbers are multiplied by, exactly: a power of two for tiles.
float row_factor(const PackedMatrix& w, const uint8_t* panel, int column) {
  if (!is_tiled(w.format)) return 1;
  float scale;
  std::memcpy(&scale, panel + column_scales_at(w.format, w.k / kGroup) + 4 * column, 4);
  return std::ldexp(scale, kTileShift);
}

}  // namespace

void embed(const EmbedArgs& a, const Step& s, Worker& w) {
  w.team.own(w.thread, s.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; t++) {
      int id = s.token_ids[t];
      const uint8_t* panel = a.table.data + (size_t)(id / kPanel) * a.table.panel_bytes;
      float* out = (float*)s.at(a.out, t);
      // One row lies scattered over its panel: ask for all of its lines before waiting for the first.
      const bool wide = a.table.format == Format::F32 || a.table.format == Format::BF16;
      const size_t step = wide ? 128 : 64;
      for (size_t i = 0; i < a.table.panel_bytes; i += step) prefetch(panel + i + (wide ? id % kPanel * 4 : 0));
      const float factor = row_factor(a.table, panel, id % kPanel);
      for (int k = 0; k < a.table.k; k++) out[k] = weight_at(a.table, panel, id % kPanel, k) * factor;
    }
  });
}

namespace {

// RMSNorm (Zhang and Sennrich, 2019) of one row into `out`, with an optional residual added first into `sum`.
void norm_row(const NormArgs& a, const float* x, const float* delta, float* sum, float* y, uint8_t* out) {
  int i = 0;
  if (delta) {
    for (; i + 16 <= a.k; i += 16) store_f(sum + i, add(load_f(x + i), load_f(delta + i)));
    for (; i < a.k; i++) sum[i] = x[i] + delta[i];
    x = sum;
  }
  F32 squares = zero_f();
  for (i = 0; i + 16 <= a.k; i += 16) {
    F32 v = load_f(x + i);
    squares = fma(v, v, squares);
  }
  float total = reduce_add(squares);
  for (; i < a.k; i++) total += x[i] * x[i];
  float scale = 1.0f / std::sqrt(total / (float)a.k + a.eps);
  for (i = 0; i + 16 <= a.k; i += 16) store_f(y + i, mul(mul(load_f(x + i), splat(scale)), load_f(a.weight + i)));
  for (; i < a.k; i++) y[i] = x[i] * scale * a.weight[i];
  store_row(a.out_dtype, out, a.k, y);
}

}  // namespace

void norm(const NormArgs& a, const Step& s, Worker& w) {
  float* y = (float*)w.scratch;
  auto row = [&](int r, int x, int to) {  // x and sum may be the same row
    const float* delta = a.has_delta ? (const float*)s.at(a.delta, r) : nullptr;
    norm_row(a, (const float*)s.at(a.x, x), delta, a.has_delta ? (float*)s.at(a.sum, to) : nullptr, y, s.at(a.out, to));
  };
  auto hand_out = [&](int r) {
    if (s.hidden_rows[r] >= 0) std::memcpy(s.hidden + (size_t)s.hidden_rows[r] * a.k, y, 4 * (size_t)a.k);
  };
  const bool pools = a.is_final && s.hidden;
  const int rows = s.rows(a.rows);
  if (rows == 1 && a.per_thread) {
    row(0, a.x_per_thread ? w.thread : 0, w.thread);
    if (pools && w.thread == 0) hand_out(0);
    return;
  }
  w.team.own(w.thread, rows, [&](int begin, int end) {
    for (int r = begin; r < end; r++) {
      row(r, r, r);
      if (pools) hand_out(r);
    }
  });
}

void quantize(const QuantizeArgs& a, const Step& s, Worker& w) {
  int rows = s.rows(a.rows);
  w.team.own(w.thread, rows, [&](int begin, int end) {
    for (int r = begin; r < end; r++) store_row(a.out_dtype, s.at(a.out, r), a.k, (const float*)s.at(a.x, r));
  });
}

void elementwise(const ElementwiseArgs& a, const Step& s, Worker& w) {
  int rows = s.rows(a.rows);
  auto apply = [&](F32 x, F32 y) {
    switch (a.op) {
      case Elementwise::Add: return add(x, y);
      case Elementwise::Mul: return mul(x, y);
      case Elementwise::Silu: return silu(x);
      default: return mul(silu(x), y);
    }
  };
  w.team.own(w.thread, rows, [&](int begin, int end) {
    float* z = (float*)w.scratch;
    for (int r = begin; r < end; r++) {
      const float* x = (const float*)s.at(a.a, r);
      const float* y = a.op == Elementwise::Silu ? x : (const float*)s.at(a.b, r);
      int i = 0;
      for (; i + 16 <= a.k; i += 16) store_f(z + i, apply(load_f(x + i), load_f(y + i)));
      if (i < a.k) {
        float tx[16] = {}, ty[16] = {}, tz[16];
        std::memcpy(tx, x + i, 4 * (a.k - i));
        std::memcpy(ty, y + i, 4 * (a.k - i));
        store_f(tz, apply(load_f(tx), load_f(ty)));
        std::memcpy(z + i, tz, 4 * (a.k - i));
      }
      store_row(a.out_dtype, s.at(a.out, r), a.k, z);
    }
  });
}

void select(const SelectArgs& a, const Step& s, Worker& w) {
  w.team.own(w.thread, s.sampled, [&](int begin, int end) {
    for (int r = begin; r < end; r++) std::memcpy(s.at(a.out, r), s.at(a.x, s.sample_rows[r]), a.row_bytes);
  });
}

void concat(const ConcatArgs& a, const Step& s, Worker& w) {
  int rows = s.rows(a.rows);
  w.team.own(w.thread, rows, [&](int begin, int end) {
    for (int r = begin; r < end; r++) {
      float* out = (float*)s.at(a.out, r);
      for (int p = 0; p < a.count; p++) {
        std::memcpy(out, s.at(a.parts[p], r), 4 * (size_t)a.widths[p]);
        out += a.widths[p];
      }
    }
  });
}

}  // namespace ridgeline::RL_ISA
