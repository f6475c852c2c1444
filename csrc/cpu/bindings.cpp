// The Python face of the native executor. Arrays come in as numpy, the GIL is released while work runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>

#include "executor.h"

namespace py = pybind11;
using namespace ridgeline;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

Format format_of(const std::string& name) {
  if (name == "f32") return Format::F32;
  if (name == "f16") return Format::F16;
  if (name == "bf16") return Format::BF16;
  if (name == "q8_0") return Format::Q8_0;
  if (name == "q4_0") return Format::Q4_0;
  if (name == "q4_1") return Format::Q4_1;
  throw std::invalid_argument("no native kernel for weight format " + name);
}

// What an operator may store; F16 is a type of weights and caches only.
Dtype stored_dtype(Dtype d) {
  if (d == Dtype::F16) throw std::invalid_argument("no native kernel stores f16 activations");
  return d;
}

Dtype dtype_of(const std::string& name) {
  if (name == "f32") return Dtype::F32;
  if (name == "f16") return Dtype::F16;
  if (name == "bf16") return Dtype::BF16;
  if (name == "q8") return Dtype::Q8;
  throw std::invalid_argument("no native kernel for activation type " + name);
}

// int8 in a cache: one scale for each token and head.
Dtype kv_dtype_of(const std::string& name) {
  if (name == "int8") return Dtype::Q8;
  if (name == "q8") throw std::invalid_argument("q8 is a type of activations: a cache holds int8");
  return dtype_of(name);
}

Rows rows_of(const std::string& name) {
  if (name == "T") return Rows::Tokens;
  if (name == "S") return Rows::Sampled;
  throw std::invalid_argument("rows must be 'T' or 'S', got '" + name + "'");
}

Elementwise elementwise_of(const std::string& name) {
  if (name == "add") return Elementwise::Add;
  if (name == "mul") return Elementwise::Mul;
  if (name == "silu") return Elementwise::Silu;
  if (name == "silu_mul") return Elementwise::SiluMul;
  throw std::invalid_argument("no native elementwise operator " + name);
}

using Place = std::pair<size_t, size_t>;  // offset, stride
Buffer buffer_of(const Place& p) { return {p.first, p.second}; }

// Row pointers of a matrix put together from parts: concatenated, or 16 rows of each in turn.
std::vector<const uint8_t*> gather_rows(const std::vector<std::pair<Array<uint8_t>, py::object>>& parts, Format format,
                                        int k, int interleave) {
  const size_t row_bytes = file_row_bytes(format, k);
  std::vector<std::vector<const uint8_t*>> rows;
  for (const auto& [data, order] : parts) {
    size_t count = row_bytes ? (size_t)data.size() / row_bytes : 0;
    if (count * row_bytes != (size_t)data.size()) throw std::invalid_argument("weight data is not whole rows");
    std::vector<const uint8_t*> r(count);
    for (size_t i = 0; i < count; i++) r[i] = data.data() + i * row_bytes;
    if (!order.is_none()) {
      auto index = py::cast<Array<int64_t>>(order);
      if ((size_t)index.size() != count) throw std::invalid_argument("row_order must name every row");
      for (size_t i = 0; i < count; i++) {
        int64_t from = index.data()[i];
        if (from < 0 || from >= (int64_t)count) throw std::invalid_argument("row_order out of range");
        r[i] = data.data() + (size_t)from * row_bytes;
      }
    }
    rows.push_back(std::move(r));
  }
  std::vector<const uint8_t*> all;
  if (interleave == 0) {
    for (const auto& r : rows) all.insert(all.end(), r.begin(), r.end());
    return all;
  }
  for (size_t i = 0; i < rows.at(0).size(); i += (size_t)interleave)
    for (const auto& r : rows) {
      if (r.size() != rows[0].size() || r.size() % (size_t)interleave)
        throw std::invalid_argument("interleaved parts must be alike and a multiple of the interleave");
      all.insert(all.end(), r.begin() + (long)i, r.begin() + (long)i + interleave);
    }
  return all;
}

// A matrix as its file has it, ready to be packed without Python.
struct FileMatrix {
  FileMatrix(std::vector<std::pair<Array<uint8_t>, py::object>> from, const std::string& format_name, int columns,
             int interleave, bool tiles)
      : parts(std::move(from)),
        format(format_of(format_name)),
        k(columns),
        rows(gather_rows(parts, format, k, interleave)),
        tiles(tiles) {
    for (const auto& [data, order] : parts) bytes.emplace_back(data.data(), (size_t)data.size());
  }

  std::vector<std::pair<Array<uint8_t>, py::object>> parts;  // kept alive
  Format format;
  int k;
  std::vector<const uint8_t*> rows;
  bool tiles;
  std::vector<std::pair<const uint8_t*, size_t>> bytes;  // of the parts
};

// Gives back the pages of `mapping`, a file's, that hold a packed matrix: they are read again if touched. Pages shared
// with a neighbour go too.
void drop_pages(const FileMatrix& m, std::pair<const uint8_t*, size_t> mapping) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)mapping.first, end = begin + mapping.second;
  for (const auto& [data, size] : m.bytes) {
    const uintptr_t at = (uintptr_t)data;
    if (at >= begin && at + size <= end) madvise((void*)(at / page * page), at % page + size, MADV_DONTNEED);
  }
}

// Packs all matrices in one call: a thread that came back for the interpreter after each would wait for whoever has it
// by then. Also returns which is the first that holds NaN or infinity, or -1, and why the first behind the last that
// is returned is refused, or None.
py::tuple pack_weights(Executor& e, const std::vector<const FileMatrix*>& matrices,
                       const std::optional<Array<uint8_t>>& mapped) {
  std::vector<PackedMatrix> packed;
  std::optional<std::string> refusal;
  int damaged = -1;
  std::pair<const uint8_t*, size_t> mapping;
  if (mapped) mapping = {mapped->data(), (size_t)mapped->size()};
  {
    py::gil_scoped_release release;
    for (const FileMatrix* m : matrices) {
      try {
        int bad_row = -1;
        packed.push_back(e.pack(m->rows, m->format, m->k, m->tiles, &bad_row));
        if (bad_row >= 0 && damaged < 0) damaged = (int)packed.size() - 1;
      } catch (const std::invalid_argument& error) {
        refusal = error.what();
        break;
      }
      if (mapping.first) drop_pages(*m, mapping);
    }
  }
  return py::make_tuple(packed, damaged, refusal);
}

template <class T>
py::array_t<T> copy(const std::vector<T>& v, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(shape, v.data());
}

// A core/types.py SlotStart.
SlotStart slot_start_of(const py::handle& h) {
  SlotStart s;
  auto take = [&](const char* name, auto& field) {
    field = py::cast<std::decay_t<decltype(field)>>(h.attr(name));
  };
  auto take_array = [&]<class T>(const char* name, std::vector<T>& field) {
    auto array = py::cast<Array<T>>(h.attr(name));
    field.assign(array.data(), array.data() + array.size());
  };
  take("slot", s.slot);
  take("prompt_len", s.prompt_len);
  take("min_tokens", s.min_tokens);
  take("repetition_penalty", s.repetition);
  take("presence_penalty", s.presence);
  take("frequency_penalty", s.frequency);
  take_array("tokens", s.tokens);
  take_array("bias_ids", s.bias_ids);
  take_array("bias", s.bias);
  take_array("min_tokens_ids", s.min_tokens_ids);
  take("bad_words", s.bad_words);
  return s;
}

void launch(Executor& e, const Array<int32_t>& token_ids, const Array<int32_t>& positions,
            const Array<int32_t>& slots, const Array<int32_t>& query_starts, const Array<int32_t>& context_lens,
            const Array<int32_t>& sample_rows, const py::array& sampling, const Array<int32_t>& block_updates,
            const Array<int32_t>& block_copies, const py::sequence& slot_starts) {
  std::vector<SlotStart> starts;
  for (const py::handle& start : slot_starts) starts.push_back(slot_start_of(start));
  BatchView b{};
  b.tokens = (int)token_ids.size();
  b.requests = (int)slots.size();
  b.sampled = (int)sample_rows.size();
  b.updates = (int)(block_updates.size() / 3);
  b.copies = (int)(block_copies.size() / 2);
  if (b.updates * 3 != block_updates.size() || b.copies * 2 != block_copies.size())
    throw std::invalid_argument("block updates are [N, 3] and block copies [N, 2]");
  if (positions.size() != b.tokens || query_starts.size() != b.requests + 1 || context_lens.size() != b.requests)
    throw std::invalid_argument("batch arrays differ in length");
  if (sampling.size() != b.sampled || (b.sampled && sampling.itemsize() != (py::ssize_t)sizeof(SamplingRow)) ||
      !(sampling.flags() & py::array::c_style))
    throw std::invalid_argument("sampling must be one contiguous row of SAMPLING_DTYPE per sampled row");
  b.token_ids = token_ids.data();
  b.positions = positions.data();
  b.slots = slots.data();
  b.query_starts = query_starts.data();
  b.context_lens = context_lens.data();
  b.sample_rows = sample_rows.data();
  b.sampling = (const SamplingRow*)sampling.data();
  b.block_updates = block_updates.data();
  b.block_copies = block_copies.data();
  b.slot_starts = &starts;
  py::gil_scoped_release release;
  e.launch(b);
}

py::tuple finish(Executor& e, const py::object& masks) {
  if (!masks.is_none()) {
    auto bits = py::cast<Array<uint32_t>>(masks);
    int rows = bits.ndim() == 2 ? (int)bits.shape(0) : 0;
    if (bits.ndim() != 2 || bits.shape(1) != (e.config().vocab + 31) / 32)
      throw std::invalid_argument("token masks must be [flagged, ceil(vocab / 32)] uint32");
    py::gil_scoped_release release;
    e.finish(bits.data(), rows);
  } else {
    e.finish(nullptr, 0);
  }
  py::ssize_t s = e.sampled(), k = e.num_top(), p = e.pooled(), h = p ? e.hidden_size : 0;
  return py::make_tuple(copy(e.tokens(), {s}), copy(e.accepted(), {s}), copy(e.logprobs(), {s}),
                        copy(e.top_ids(), {s, k}), copy(e.top_logprobs(), {s, k}), copy(e.hidden(), {p, h}));
}

py::array_t<float> logits(const Executor& e) {
  py::array_t<float> out({(py::ssize_t)e.sampled(), (py::ssize_t)e.config().vocab});
  for (int r = 0; r < e.sampled(); r++) {
    const float* row = e.logits(r);
    if (row) std::copy(row, row + e.config().vocab, out.mutable_data(r, 0));
    if (!row) std::fill_n(out.mutable_data(r, 0), e.config().vocab, std::numeric_limits<float>::quiet_NaN());
  }
  return out;
}

RopeKvArgs rope_of(const Executor& e, Place qkv, Place q, int layer) {
  const ExecutorConfig& g = e.config();
  return {buffer_of(qkv), buffer_of(q), g.heads, g.kv_heads, g.head_dim, layer};
}

void bind_ops(py::class_<Executor>& c) {
  c.def("add_embed", [](Executor& e, const std::string& name, Place out, const PackedMatrix& table) {
    e.add_op(name, [a = EmbedArgs{buffer_of(out), table}, f = e.kernels().embed](const Step& s, Worker& w) {
      f(a, s, w);
    });
  });
  c.def("add_norm", [](Executor& e, const std::string& name, Place x, std::optional<Place> delta,
                       std::optional<Place> sum, Place out, const Array<float>& weight, float eps,
                       const std::string& dtype, const std::string& rows, bool per_thread, bool x_per_thread,
                       bool is_final) {
    NormArgs a;
    a.per_thread = per_thread;
    a.x_per_thread = x_per_thread;
    a.is_final = is_final;
    a.x = buffer_of(x);
    a.has_delta = delta.has_value();
    if (delta) a.delta = buffer_of(*delta);
    if (sum) a.sum = buffer_of(*sum);
    a.out = buffer_of(out);
    a.k = (int)weight.size();
    a.weight = e.keep_vector(weight.data(), (size_t)weight.size());
    a.eps = eps;
    a.out_dtype = stored_dtype(dtype_of(dtype));
    a.rows = rows_of(rows);
    if (is_final && a.rows != Rows::Sampled) throw std::invalid_argument("a final norm has a row for each sampled one");
    if (is_final) e.hidden_size = a.k;
    if ((size_t)a.k * sizeof(float) > kScratchBytes) throw std::invalid_argument("a norm's row is too long");
    using Free = Executor::BarrierFree;
    Free free = !per_thread ? Free::Never : a.rows == Rows::Tokens ? Free::OneToken : Free::OneSampled;
    e.add_op(name, [a, f = e.kernels().norm](const Step& s, Worker& w) { f(a, s, w); }, free);
  });
  c.def("add_quantize", [](Executor& e, const std::string& name, Place x, Place out, int k, const std::string& dtype,
                           const std::string& rows) {
    QuantizeArgs a{buffer_of(x), buffer_of(out), k, stored_dtype(dtype_of(dtype)), rows_of(rows)};
    e.add_op(name, [a, f = e.kernels().quantize](const Step& s, Worker& w) { f(a, s, w); });
  });
  c.def("add_linear", [](Executor& e, const std::string& name, Place x, Place out, const PackedMatrix& w,
                         bool silu_mul, const std::string& dtype, const std::string& rows, bool per_thread) {
    LinearArgs a{buffer_of(x),     buffer_of(out), w, silu_mul ? Epilogue::SiluMul : Epilogue::None, per_thread,
                 stored_dtype(dtype_of(dtype)), rows_of(rows)};
    if (!silu_mul && a.out_dtype != Dtype::F32) throw std::invalid_argument("a linear alone stores fp32");
    a.next_layer = e.attention_layers < e.config().layers ? e.attention_layers : -1;
    if (silu_mul && w.n % 32) throw std::invalid_argument("a gated linear needs whole pairs of tiles");
    if (a.out_dtype == Dtype::Q8 && w.n % 64) throw std::invalid_argument("a q8 output needs whole groups of 32");
    e.add_op(name, [&a = e.keep_linear(a), f = e.kernels().linear](const Step& s, Worker& k) { f(a, s, k); });
  });
  c.def("add_rope_kv", [](Executor& e, const std::string& name, Place qkv, Place q, int layer) {
    RopeKvArgs a = rope_of(e, qkv, q, layer);
    e.add_op(name, [a, f = e.kernels().rope_kv](const Step& s, Worker& w) { f(a, s, w); }, Executor::BarrierFree::OneEach);
  });
  c.def("add_attention", [](Executor& e, const std::string& name, Place qkv, Place q, Place out, int layer,
                            float scale, const std::string& dtype) {
    e.attention_layers = layer + 1;
    AttentionArgs a{rope_of(e, qkv, q, layer), buffer_of(out), scale, stored_dtype(dtype_of(dtype))};
    if (a.out_dtype == Dtype::Q8 && a.rope.head_dim % kGroup)
      throw std::invalid_argument("attention cannot quantize heads of " + std::to_string(a.rope.head_dim));
    e.add_op(name, [a, f = e.kernels().attention](const Step& s, Worker& w) { f(a, s, w); });
  });
  c.def("add_select", [](Executor& e, const std::string& name, Place x, Place out) {
    SelectArgs a{buffer_of(x), buffer_of(out), std::min(x.second, out.second)};
    e.add_op(name, [a, f = e.kernels().select](const Step& s, Worker& w) { f(a, s, w); });
  });
  c.def("add_elementwise", [](Executor& e, const std::string& name, const std::string& op, Place x, Place y, Place out,
                              int k, const std::string& dtype, const std::string& rows) {
    ElementwiseArgs a{buffer_of(x),       buffer_of(y),    buffer_of(out), k,
                      elementwise_of(op), stored_dtype(dtype_of(dtype)), rows_of(rows)};
    if ((size_t)k * sizeof(float) > kScratchBytes) throw std::invalid_argument("an elementwise row is too long");
    e.add_op(name, [a, f = e.kernels().elementwise](const Step& s, Worker& w) { f(a, s, w); });
  });
  c.def("add_concat", [](Executor& e, const std::string& name, const std::vector<std::pair<Place, int>>& parts,
                         Place out, const std::string& rows) {
    ConcatArgs a;
    if (parts.size() > 3) throw std::invalid_argument("concat takes at most three parts");
    for (const auto& [place, width] : parts) {
      a.parts[a.count] = buffer_of(place);
      a.widths[a.count++] = width;
    }
    a.out = buffer_of(out);
    a.rows = rows_of(rows);
    e.add_op(name, [a, f = e.kernels().concat](const Step& s, Worker& w) { f(a, s, w); });
  });
}

// (steps, seconds of all of them, rows of (name, calls, seconds, busy, longest)), operators first, in the plan's order.
py::tuple profile(const Executor& e) {
  const Profile& p = e.profile();
  const double tick = p.seconds_per_tick();
  const std::vector<std::string>& names = e.op_names();
  py::list rows;
  for (size_t i = 0; i < p.rows().size(); i++) {
    const ProfileRow& r = p.rows()[i];
    const std::string name = i < names.size() ? names[i] : Profile::name(i - names.size());
    rows.append(py::make_tuple(name, r.calls, (double)r.wall * tick, (double)r.busy * tick, (double)r.longest * tick));
  }
  return py::make_tuple(p.steps(), (double)p.total() * tick, rows);
}

std::unique_ptr<Executor> make_executor(const py::dict& d) {
  ExecutorConfig c;
  auto take = [&](const char* key, auto& field) {
    field = py::cast<std::decay_t<decltype(field)>>(d[key]);
  };
  take("isa", c.isa);
  take("threads", c.threads);
  take("max_tokens", c.max_tokens);
  take("max_sampled", c.max_sampled);
  take("num_slots", c.num_slots);
  take("max_blocks_per_slot", c.max_blocks_per_slot);
  take("num_blocks", c.num_blocks);
  take("layers", c.layers);
  take("heads", c.heads);
  take("kv_heads", c.kv_heads);
  take("head_dim", c.head_dim);
  take("vocab", c.vocab);
  take("arena_bytes", c.arena_bytes);
  take("weight_bytes", c.weight_bytes);
  take("rope_frequency", c.rope_frequency);
  c.kv_dtype = kv_dtype_of(py::cast<std::string>(d["kv_dtype"]));
  if (c.kv_heads < 1 || c.heads % c.kv_heads || c.heads / c.kv_heads > kMaxTileRows)
    throw std::invalid_argument("attention needs 1 to 48 query heads for each KV head");
  if (c.head_dim < 16 || c.head_dim % 16 || c.head_dim > kMaxHeadDim)
    throw std::invalid_argument("attention needs a head size that is a multiple of 16 up to 256, not " +
                                std::to_string(c.head_dim));
  if ((int)c.rope_frequency.size() != c.head_dim / 2)
    throw std::invalid_argument("rope_frequency needs one entry per pair of head dimensions");
  return std::make_unique<Executor>(c);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Ridgeline's CPU executor: packed weights, paged cache and a plan run by a thread team.";
  py::class_<PackedMatrix>(m, "PackedMatrix")
      .def_readonly("n", &PackedMatrix::n)
      .def_readonly("k", &PackedMatrix::k);
  py::class_<FileMatrix>(m, "FileMatrix")
      .def(py::init<std::vector<std::pair<Array<uint8_t>, py::object>>, std::string, int, int, bool>());
  py::class_<Executor> executor(m, "Executor");
  executor.def(py::init(&make_executor))
      .def("pack", &pack_weights, py::arg("matrices"), py::arg("mapped") = py::none())
      .def("set_logits", [](Executor& e, Place p) { e.set_logits(buffer_of(p)); })
      .def("set_head", &Executor::set_head)
      .def("launch", &launch)
      .def("finish", &finish)
      .def("logits", &logits)
      .def("set_profiling", &Executor::set_profiling)
      .def("op_names", [](const Executor& e) { return e.op_names(); })
      .def("reset_profile", &Executor::reset_profile)
      .def("profile", &profile)
      .def_property_readonly("isa", [](const Executor& e) { return e.kernels().name; })
      .def_property_readonly("threads", [](Executor& e) { return e.team().size(); });
  bind_ops(executor);
  m.def("packed_bytes", [](const std::string& format, int n, int k, bool tiles) {
    return packed_bytes(packed_layout(packed_format(format_of(format), tiles), n, k));
  });
  m.def("available_threads", &available_threads);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.push_back(k->name);
    return names;
  });
  m.def("measure_bandwidth", [](size_t bytes, int threads, double seconds, const std::string& isa) {
    py::gil_scoped_release release;
    return measure_bandwidth(*select_kernels(isa), bytes, threads, seconds) / 1e9;
  }, py::arg("bytes") = (size_t)96 << 20, py::arg("threads") = 0, py::arg("seconds") = 0.3, py::arg("isa") = "");
  m.def("measure_peaks", [](int threads, const std::string& isa) {
    py::gil_scoped_release release;
    const Kernels& k = *select_kernels(isa);
    return std::map<std::string, double>{{"int8", measure_peak(k, 0, threads) / 1e9},
                                         {"bf16", measure_peak(k, 1, threads) / 1e9},
                                         {"f32", measure_peak(k, 2, threads) / 1e9}};
  }, py::arg("threads") = 0, py::arg("isa") = "");
}
