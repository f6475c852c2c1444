"""Every operator of ``graph/ops.py`` in numpy.

Arithmetic runs in ``dtype``: float32 is a straightforward implementation that rounds only where the
declaration says; float64 is the truth that kernels are measured against, where the roundings inside
attention (q and probabilities in bf16) are left out. What an operator hands out quantized, or writes to
the cache, is rounded either way: that is its result, not an error of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ridgeline.backends.reference.cache import PagedCache, StepContext, read, write
from ridgeline.backends.reference.numerics import Q8, Array, fixed_point, quantize_q8, rounded
from ridgeline.graph.ir import INTERLEAVE
from ridgeline.graph.ops import OPS

Attrs = Mapping[str, Any]
Kernel = Callable[["_Call"], tuple[Any, ...]]


class _Call:
    """One operator call: inputs, attributes and how to compute."""

    def __init__(self, inputs: Sequence[Any], attrs: Attrs, dtype: Any, context: StepContext | None) -> None:
        self.inputs, self.attrs, self.dtype = inputs, attrs, dtype
        self._context = context

    def array(self, index: int) -> Array:
        """Input ``index`` as numbers of the compute type."""
        value = self.inputs[index]
        if isinstance(value, Q8):
            return value.values(self.dtype)
        return np.asarray(value).astype(self.dtype, copy=False)

    def cache(self, index: int) -> PagedCache:
        value = self.inputs[index]
        assert isinstance(value, PagedCache)
        return value

    @property
    def context(self) -> StepContext:
        if self._context is None:
            raise ValueError("this operator reads the cache: run_op needs a context")
        return self._context

    def out(self, y: Array) -> Array | Q8:
        """``y``, quantized if the attribute asks for it."""
        return quantized(y, self.attrs["quantize"]) if self.attrs["quantize"] else y


def run_op(
    op: str, inputs: Sequence[Any], attrs: Attrs, dtype: Any = np.float32, context: StepContext | None = None
) -> tuple[Any, ...]:
    """Runs one operator.

    Args:
        op: its name in ``graph/ops.py``.
        inputs: arrays ([rows, columns] activations, int ids and positions), ``Q8`` for a "q8" activation,
            dequantized weights as [N, K] arrays (a merged one in its merged row order), ``PagedCache``.
        attrs: attributes; those with a default may be left out.
        dtype: compute type, np.float32 or np.float64.
        context: needed by operators on the cache.

    Returns:
        The outputs, in order: arrays of ``dtype`` (a "bf16" one holds rounded numbers), ``Q8``, caches.
    """
    return KERNELS[op](_Call(inputs, OPS[op].complete(attrs), dtype, context))


def quantized(y: Array, to: str) -> Array | Q8:
    """Activations as the next linear reads them: "q8" or "bf16"."""
    return quantize_q8(y) if to == "q8" else rounded(y, to)


def _embed(call: _Call) -> tuple[Any, ...]:
    return (call.array(1)[np.asarray(call.inputs[0])],)


def _norm(call: _Call, x: Array, w: Array) -> Array:
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=call.dtype)
    y: Array = x / np.sqrt(mean + call.dtype(call.attrs["eps"])) * w
    return y


def _rms_norm(call: _Call) -> tuple[Any, ...]:
    return (call.out(_norm(call, call.array(0), call.array(1))),)


def _add_rms_norm(call: _Call) -> tuple[Any, ...]:
    total = call.array(0) + call.array(1)
    return total, call.out(_norm(call, total, call.array(2)))


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, and x / inf is right
        y: Array = x / (1 + np.exp(-x))
    return y


def _halves(x: Array, step: int = INTERLEAVE) -> tuple[Array, Array]:
    """Gate and up of alternating columns."""
    width = x.shape[1] // 2  # spelled out: a step may have no sampled rows
    blocks = x.reshape(x.shape[0], width // step, 2, step)
    return blocks[:, :, 0].reshape(x.shape[0], width), blocks[:, :, 1].reshape(x.shape[0], width)


def _linear(call: _Call) -> tuple[Any, ...]:
    y = call.array(0) @ call.array(1).T
    if call.attrs["epilogue"] == "silu_mul":
        gate, up = _halves(y)
        return (call.out(_silu(gate) * up),)
    return (y,)


def _split(call: _Call) -> tuple[Any, ...]:
    x, sizes, step = call.array(0), call.attrs["sizes"], call.attrs["interleave"]
    if step:
        blocks = x.reshape(x.shape[0], -1, len(sizes), step)
        return tuple(blocks[:, :, i].reshape(x.shape[0], -1) for i in range(len(sizes)))
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=1))


def _select_rows(call: _Call) -> tuple[Any, ...]:
    x, rows = call.inputs[0], np.asarray(call.inputs[1])
    return (x.rows(rows) if isinstance(x, Q8) else x[rows],)


def rotate(x: Array, positions: Array, head_dim: int, theta: float, freq_factors: Sequence[float] | None) -> Array:
    """Rotary embedding (Su et al. 2021) of [T, heads * head_dim], pairs (i, i + head_dim / 2).

    Angles, sines and cosines are computed in float64 and rounded to the type of ``x``.
    """
    half = head_dim // 2
    inverse = theta ** (-np.arange(half, dtype=np.float64) / half)
    if freq_factors is not None:
        inverse = inverse / np.asarray(freq_factors, np.float64)
    angles = np.asarray(positions, np.float64)[:, None] * inverse
    cos, sin = (f(angles).astype(x.dtype)[:, None, :] for f in (np.cos, np.sin))
    heads = x.reshape(len(x), -1, head_dim)
    a, b = heads[..., :half], heads[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def _rope(call: _Call) -> tuple[Any, ...]:
    a = call.attrs
    return (rotate(call.array(0), call.inputs[1], a["head_dim"], a["theta"], a["freq_factors"]),)


def _kv_write(call: _Call) -> tuple[Any, ...]:
    return (write(call.cache(0), call.array(1), call.array(2), call.context),)


def _rope_kv_write(call: _Call) -> tuple[Any, ...]:
    a, qkv = call.attrs, call.array(0)
    heads, kv_heads, dim = a["num_heads"], a["num_kv_heads"], a["head_dim"]
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
    q, k = (rotate(x, call.inputs[1], dim, a["theta"], a["freq_factors"]) for x in (q, k))
    return q, write(call.cache(2), k, v, call.context)


def _attention(call: _Call) -> tuple[Any, ...]:
    q, cache, context = call.array(0), call.cache(1), call.context
    round_to = cache.dtype if cache.dtype in ("bf16", "int8") and call.dtype is np.float32 else None
    y = np.zeros_like(q)
    for b, slot in enumerate(context.slots):
        start, end = context.query_starts[b], context.query_starts[b + 1]
        if end > start:
            k, v = read(cache, int(slot), int(context.context_lens[b]), context)
            y[start:end] = _attend(call, q[start:end], k, v, context.positions[start:end], round_to)
    return (call.out(y),)


def _attend(call: _Call, q: Array, k: Array, v: Array, positions: Array, round_to: str | None) -> Array:
    """One request: q [n, heads * d] over its k, v [c, kv_heads, d]."""
    a, n, c = call.attrs, len(q), len(k)
    kv_heads, dim = a["num_kv_heads"], a["head_dim"]
    if round_to:
        q = rounded_query(q.reshape(n, -1, dim), round_to).reshape(q.shape)
    grouped = q.reshape(n, kv_heads, -1, dim).transpose(1, 2, 0, 3)  # [kv_heads, queries per KV head, n, d]
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * call.dtype(a["scale"])
    keys, at = np.arange(c), positions[:, None]
    seen = keys <= at
    if a["window"] is not None:
        seen &= keys > at - a["window"]
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total = p.sum(axis=-1, keepdims=True)
    values = v.transpose(1, 0, 2)[:, None]  # [kv_heads, 1, c, d]
    if round_to:
        p = rounded_weights(p, values, round_to)
    y: Array = p @ values / total
    return y.transpose(2, 0, 1, 3).reshape(n, -1)


INT8_QUERY, INT8_WEIGHT = 127 * 128 + 63, 65535
"""Beside an int8 cache queries are whole multiples of their head's largest magnitude over the first of these, and
probabilities times the scales of their values multiples of their row's largest over the second."""


def rounded_query(q: Array, dtype: str) -> Array:
    """Queries [n, heads, head_dim] as they multiply the keys of a bf16 or int8 cache."""
    return fixed_point(q, INT8_QUERY) if dtype == "int8" else rounded(q, dtype)


def rounded_weights(p: Array, v: Array, dtype: str) -> Array:
    """Probabilities [..., c] as they multiply the values [..., c, head_dim] of a bf16 or int8 cache."""
    if dtype != "int8":
        return rounded(p, dtype)
    scale = np.abs(v).max(axis=-1)[..., None, :] / 127
    result: Array = fixed_point(p * scale, INT8_WEIGHT) / np.where(scale > 0, scale, 1)
    return result


KERNELS: dict[str, Kernel] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "linear": _linear,
    "quantize": lambda call: (quantized(call.array(0), call.attrs["to"]),),
    "add": lambda call: (call.array(0) + call.array(1),),
    "mul": lambda call: (call.array(0) * call.array(1),),
    "silu": lambda call: (_silu(call.array(0)),),
    "silu_mul": lambda call: (call.out(_silu(call.array(0)) * call.array(1)),),
    "split": _split,
    "concat": lambda call: (np.concatenate([call.array(i) for i in range(len(call.inputs))], axis=1),),
    "select_rows": _select_rows,
    "rope": _rope,
    "kv_write": _kv_write,
    "rope_kv_write": _rope_kv_write,
    "attention": _attention,
}
