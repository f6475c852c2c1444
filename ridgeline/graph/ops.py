"""Every operator, declared once: signature, shape rule, cost. Backends give it code, passes rewrite it.

Row-wise operators compute row t of their outputs from row t of their activations alone, so selecting
rows may be moved from their output to their inputs. ``quantize`` asks an operator to hand out its result
already quantized for the linear that reads it ("q8" or "bf16"), which ``fuse_quantize`` sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.graph.cost import Cost, Load
from ridgeline.graph.ir import CacheInfo, Dim, Value, kv_row_bytes, row_bytes, row_elements

REQUIRED = object()
"""Marks an attribute without a default."""

Shape = tuple[Dim, ...]
Out = tuple[Shape, str]
Inputs = Sequence[Value]
Attrs = Mapping[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """The declaration of one operator.

    Attributes:
        inputs, outputs: names, in order; the last input of ``concat`` repeats.
        attrs: attribute names and defaults (``REQUIRED``: none).
        infer: shapes and dtypes of the outputs; raises ValueError on a mismatch.
        work: operations of a call, without bytes other than of weights and cache.
        row_wise: see the module.
        doc: the formula.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Attrs
    infer: Callable[[Inputs, Attrs], list[Out]]
    work: Callable[[Inputs, Attrs, Load], Cost]
    row_wise: bool
    doc: str

    def complete(self, attrs: Attrs) -> dict[str, Any]:
        """Attributes with defaults filled in; raises ValueError for unknown or missing ones."""
        unknown = set(attrs) - set(self.attrs)
        if unknown:
            raise ValueError(f"{self.name} has no attribute {sorted(unknown)[0]!r}")
        result = {**self.attrs, **attrs}
        missing = [k for k, v in result.items() if v is REQUIRED]
        if missing:
            raise ValueError(f"{self.name} needs attribute {missing[0]!r}")
        return result

    def cost(self, inputs: Inputs, outputs: Sequence[Value], attrs: Attrs, load: Load) -> Cost:
        """Operations and all bytes of one call under ``load``."""
        read = sum(_activation_bytes(v, load) for v in inputs)
        written = sum(_activation_bytes(v, load) for v in outputs)
        return self.work(inputs, attrs, load).plus(Cost(act_read=read, act_written=written))


OPS: dict[str, OpSpec] = {}

Infer = Callable[[Inputs, Attrs], list[Out]]
Work = Callable[[Inputs, Attrs, Load], Cost]


def _declare(
    name: str, signature: str, infer: Infer, work: Work, doc: str, row_wise: bool = False, **attrs: Any
) -> None:
    ins, outs = (tuple(part.split()) for part in signature.split("->"))
    OPS[name] = OpSpec(name, ins, outs, attrs, infer, work, row_wise, doc)


def _activation_bytes(value: Value, load: Load) -> int:
    if value.dtype in ("weight", "cache"):
        return 0
    return load.size(value.shape[0]) * row_bytes(value)


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _elementwise(per_element: float) -> Work:
    """Work of ``per_element`` float operations for each element of the first input."""

    def work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
        x = inputs[0]
        count = load.size(x.shape[0]) * row_elements(x)
        extra = count if attrs.get("quantize") else 0
        vectors = sum(v.info.format.nbytes(1, row_elements_1d(v)) for v in inputs if v.dtype == "weight")
        return Cost(scale_ops=per_element * count, convert_ops=extra, weight_bytes=vectors)

    return work


def row_elements_1d(value: Value) -> int:
    """Elements of a weight vector."""
    size = value.shape[0]
    assert isinstance(size, int)
    return size


def _no_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    return Cost()


# --- embed ------------------------------------------------------------------------------------------


def _embed_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    ids, table = inputs
    return [((ids.shape[0], table.shape[1]), "f32")]


def _embed_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    ids, table = inputs
    tokens, width = load.size(ids.shape[0]), row_elements(table)
    return Cost(convert_ops=tokens * width, weight_bytes=tokens * table.info.format.row_bytes(width))


_declare("embed", "token_ids table -> x", _embed_infer, _embed_work, "x[t] = table[token_ids[t]]", row_wise=True)

# --- norms ------------------------------------------------------------------------------------------


def _norm_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, w = inputs
    _need(w.shape == x.shape[1:], f"rms_norm: {w.name} is {w.shape}, its input {x.shape}")
    return [(x.shape, attrs["quantize"] or "f32")]


def _add_norm_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, delta, w = inputs
    _need(x.shape == delta.shape, f"add_rms_norm: {x.shape} + {delta.shape}")
    return [(x.shape, "f32"), *_norm_infer((x, w), attrs)]


_declare(
    "rms_norm",
    "x w -> y",
    _norm_infer,
    _elementwise(4),
    "y = x / sqrt(mean(x^2) + eps) * w",
    row_wise=True,
    eps=REQUIRED,
    quantize=None,
)
_declare(
    "add_rms_norm",
    "x delta w -> sum y",
    _add_norm_infer,
    _elementwise(5),
    "sum = x + delta; y = rms_norm(sum, w)",
    row_wise=True,
    eps=REQUIRED,
    quantize=None,
)

# --- linear and quantize ----------------------------------------------------------------------------


def _linear_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, w = inputs
    n, k = w.shape
    _need(x.shape[1:] == (k,), f"linear: {w.name} is {w.shape}, its input {x.shape}")
    if attrs["epilogue"] == "silu_mul":
        _need(w.info.interleave > 0 and isinstance(n, int), f"linear: {w.name} is not interleaved")
        n = n // 2 if isinstance(n, int) else n
    return [((x.shape[0], n), attrs["quantize"] or "f32")]


DOT_KIND = {"q8": "int8", "bf16": "bf16", "f32": "f32", "f16": "bf16"}
"""Which units multiply activations of a dtype; f16 and bf16 have one rate wherever both have units."""


def _linear_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    x, w = inputs
    fmt, rows, k = w.info.format, load.size(x.shape[0]), row_elements(x)
    n = row_elements_1d(w)
    scale, convert = 0.0, 0.0
    if fmt.kind == "int":
        scale = rows * n * (k // fmt.group) * (4 if fmt.has_minimum else 2)
        convert = n * k if fmt.bits < 8 else 0
    elif fmt.name == "f16":
        convert = n * k
    out = rows * n // 2
    if attrs["epilogue"] == "silu_mul":
        scale += 6 * out
    if attrs["quantize"]:
        convert += out
    if rows == 0:  # nothing sampled in this step: the head is not run
        return Cost()
    return Cost({DOT_KIND[x.dtype]: 2.0 * rows * n * k}, scale, convert, weight_bytes=fmt.nbytes(n, k))


_declare(
    "linear",
    "x w -> y",
    _linear_infer,
    _linear_work,
    "y = x @ w^T; epilogue silu_mul: y = silu(gate) * up of the interleaved halves",
    row_wise=True,
    epilogue=None,
    quantize=None,
)


def _quantize_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    (x,) = inputs
    _need(attrs["to"] in ("q8", "bf16"), f"quantize: to {attrs['to']!r}")
    _need(attrs["to"] != "q8" or row_elements(x) % 32 == 0, f"quantize: {row_elements(x)} is no multiple of 32")
    return [(x.shape, attrs["to"])]


_declare(
    "quantize",
    "x -> y",
    _quantize_infer,
    _elementwise(1),
    "q8: int8 codes of -112 to 127 per 32, the greatest positive, halves to even; bf16: nearest even",
    row_wise=True,
    to=REQUIRED,
)

# --- elementwise ------------------------------------------------------------------------------------


def _same_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    shapes = {v.shape for v in inputs}
    _need(len(shapes) == 1, f"operands differ in shape: {[v.shape for v in inputs]}")
    return [(inputs[0].shape, attrs.get("quantize") or "f32")]


_declare("add", "a b -> y", _same_infer, _elementwise(1), "y = a + b", row_wise=True)
_declare("mul", "a b -> y", _same_infer, _elementwise(1), "y = a * b", row_wise=True)
_declare("silu", "x -> y", _same_infer, _elementwise(5), "y = x / (1 + exp(-x))", row_wise=True)
_declare(
    "silu_mul",
    "gate up -> y",
    _same_infer,
    _elementwise(6),
    "y = silu(gate) * up",
    row_wise=True,
    quantize=None,
)

# --- moving -----------------------------------------------------------------------------------------


def _split_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    (x,) = inputs
    sizes, step = attrs["sizes"], attrs["interleave"]
    _need(sum(sizes) == row_elements(x), f"split: {sizes} of {x.shape}")
    _need(step == 0 or (len(set(sizes)) == 1 and sizes[0] % step == 0), f"split: {sizes} every {step}")
    return [((x.shape[0], size), x.dtype) for size in sizes]


def _concat_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    rows = {v.shape[0] for v in inputs}
    _need(len(rows) == 1, f"concat: rows differ: {[v.shape for v in inputs]}")
    return [((inputs[0].shape[0], sum(row_elements(v) for v in inputs)), inputs[0].dtype)]


def _select_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, rows = inputs
    return [((rows.shape[0], *x.shape[1:]), x.dtype)]


_declare(
    "split",
    "x -> part",
    _split_infer,
    _no_work,
    "columns in len(sizes) parts, one after another, or alternating every `interleave` columns",
    row_wise=True,
    sizes=REQUIRED,
    interleave=0,
)
_declare("concat", "parts -> y", _concat_infer, _no_work, "columns one part after another", row_wise=True)
_declare("select_rows", "x rows -> y", _select_infer, _no_work, "y[s] = x[rows[s]]")

# --- rope, cache and attention ----------------------------------------------------------------------

_HEADS: dict[str, Any] = {"num_heads": REQUIRED, "num_kv_heads": REQUIRED, "head_dim": REQUIRED}
_ROPE: dict[str, Any] = {"theta": REQUIRED, "freq_factors": None}


def _rope_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    x, _ = inputs
    _need(row_elements(x) == attrs["num_heads"] * attrs["head_dim"], f"rope: {x.shape} with {dict(attrs)}")
    return [(x.shape, "f32")]


_declare(
    "rope",
    "x positions -> y",
    _rope_infer,
    _elementwise(3),
    "rotate (i, i + head_dim / 2) of each head by position * theta^(-2i / head_dim) / freq_factors[i]",
    row_wise=True,
    num_heads=REQUIRED,
    head_dim=REQUIRED,
    **_ROPE,
)


def _cache_info(value: Value) -> CacheInfo:
    _need(value.cache is not None, f"{value.name} is no cache")
    assert value.cache is not None
    return value.cache


def _kv_bytes(info: CacheInfo) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * info.num_kv_heads * kv_row_bytes(info.dtype, info.head_dim)


def _kv_write_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    cache, k, v = inputs
    info = _cache_info(cache)
    width = info.num_kv_heads * info.head_dim
    _need(row_elements(k) == width == row_elements(v), f"kv_write: {k.shape}, {v.shape} into {info}")
    return [((), "cache")]


def _kv_write_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    info = _cache_info(inputs[0])
    tokens = load.size(inputs[1].shape[0])
    convert = tokens * 2 * info.num_kv_heads * info.head_dim
    return Cost(convert_ops=convert, kv_written=tokens * _kv_bytes(info))


_declare(
    "kv_write",
    "cache k v -> cache",
    _kv_write_infer,
    _kv_write_work,
    "each token's k and v, rounded to the cache's dtype, at its slot and position",
)


def _rope_kv_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    qkv, _, cache = inputs
    info, dim = _cache_info(cache), attrs["head_dim"]
    _need((info.num_kv_heads, info.head_dim) == (attrs["num_kv_heads"], dim), f"rope_kv_write: {info}")
    width = (attrs["num_heads"] + 2 * attrs["num_kv_heads"]) * dim
    _need(row_elements(qkv) == width, f"rope_kv_write: {qkv.shape}, expected {width} columns")
    return [((qkv.shape[0], attrs["num_heads"] * dim), "f32"), ((), "cache")]


def _rope_kv_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    qkv, _, cache = inputs
    info, tokens = _cache_info(cache), load.size(qkv.shape[0])
    rotated = tokens * (attrs["num_heads"] + info.num_kv_heads) * info.head_dim
    convert = tokens * 2 * info.num_kv_heads * info.head_dim
    return Cost(scale_ops=3 * rotated, convert_ops=convert, kv_written=tokens * _kv_bytes(info))


_declare(
    "rope_kv_write",
    "qkv positions cache -> q cache",
    _rope_kv_infer,
    _rope_kv_work,
    "q, k, v = split(qkv); q = rope(q); cache = kv_write(cache, rope(k), v)",
    **_HEADS,
    **_ROPE,
)


def _attention_infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    q, cache = inputs
    info, dim = _cache_info(cache), attrs["head_dim"]
    _need((info.num_kv_heads, info.head_dim) == (attrs["num_kv_heads"], dim), f"attention: {info}")
    _need(row_elements(q) == attrs["num_heads"] * dim, f"attention: {q.shape} with {dict(attrs)}")
    _need(attrs["num_heads"] % attrs["num_kv_heads"] == 0, "attention: heads are no multiple of KV heads")
    return [(q.shape, attrs["quantize"] or "f32")]


def _attention_work(inputs: Inputs, attrs: Attrs, load: Load) -> Cost:
    q, cache = inputs
    info, heads = _cache_info(cache), attrs["num_heads"]
    read = load.kv_tokens_read * _kv_bytes(info)
    if q.dtype in ("bf16", "f16"):  # a GPU multiplies in the queries' type, whatever the cache holds
        kind, planes, converts = "bf16", 1, info.dtype != q.dtype
    else:
        kind = {"bf16": "bf16", "int8": "int8"}.get(info.dtype, "f32")
        planes = 2 if info.dtype == "int8" else 1  # queries and weights are two bytes wide beside int8
        converts = info.dtype == "f16"
    convert = load.kv_tokens_read * 2 * info.num_kv_heads * info.head_dim if converts else 0
    convert += load.size(q.shape[0]) * row_elements(q) if attrs["quantize"] else 0
    dot = 4.0 * planes * load.attn_pairs * heads * info.head_dim
    return Cost({kind: dot}, scale_ops=12.0 * load.attn_pairs * heads, convert_ops=convert, kv_read=read)


_declare(
    "attention",
    "q cache -> y",
    _attention_infer,
    _attention_work,
    "softmax(scale * q k^T) v per head, over the request's keys at positions (p - window, p]",
    **_HEADS,
    scale=REQUIRED,
    window=None,
    quantize=None,
)
