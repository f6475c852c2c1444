"""How wrong a kernel may be: at most twice what its precision must cost.

A kernel's error, max|difference| / rms(truth) against float64, is compared with that of a straightforward
implementation that rounds only where the operator's declaration says. One unit in the last place of the largest
result is always allowed: what is stored cannot be nearer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ridgeline.backends.reference.numerics import Q8, quantize_q8, rounded
from ridgeline.backends.reference.ops import rounded_query, rounded_weights, run_op
from ridgeline.core.formats import WeightFormat

FACTOR = 2.0


def rms(x: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def ulp(dtype: str, magnitude: float) -> float:
    """Distance between neighbouring numbers of a dtype around ``magnitude``."""
    return float(np.spacing(np.float32(magnitude))) * (2.0**16 if dtype == "bf16" else 1.0)


def excess(values: np.ndarray, truth: np.ndarray, step: np.ndarray) -> float:
    """max(|difference| - half a quantization step)."""
    return float(np.max(np.abs(values.astype(np.float64) - truth) - step / 2, initial=0.0))


def decode(raw: np.ndarray, dtype: str) -> np.ndarray | Q8:
    """Rows of bytes as the numbers they hold; a q8 row's redundant sums are checked on the way."""
    raw = np.ascontiguousarray(raw)
    if dtype == "f32":
        return raw.view(np.float32)
    if dtype == "bf16":
        return raw.view(ml_dtypes.bfloat16).astype(np.float32)
    groups = raw.reshape(len(raw), -1, 48)  # 32 codes and four numbers of 4 bytes
    codes, numbers = groups[:, :, :32].view(np.int8), np.ascontiguousarray(groups[:, :, 32:])
    scales, scaled_sums = (numbers[:, :, i : i + 4].copy().view(np.float32)[..., 0] for i in (0, 4))
    sums, paired = (numbers[:, :, i : i + 4].copy().view(np.int32)[..., 0] for i in (8, 12))
    wide = codes.astype(np.int32)
    np.testing.assert_array_equal(sums, wide.sum(axis=2))
    np.testing.assert_array_equal(scaled_sums, scales * sums.astype(np.float32))
    low, high = wide[:, :, :12], wide[:, :, 16:28]
    if paired.any():  # else an instruction set that has no use for it
        np.testing.assert_array_equal(paired, -(low * high + 112 * high - 16 * low).sum(axis=2))
    assert codes.size == 0 or codes.min() >= -112
    codes = np.ascontiguousarray(codes).reshape(len(raw), -1)
    return Q8(codes, np.ascontiguousarray(scales))


def steps_of(truth: np.ndarray) -> np.ndarray:
    """The size of a q8 step at each value."""
    groups = truth.reshape(len(truth), -1, 32)
    extremes = np.sort(np.maximum([groups.max(axis=2), -groups.min(axis=2)], 0), axis=0)
    return np.repeat(np.maximum(extremes[0] / 112, extremes[1] / 127), 32, axis=1)


def assert_accurate(raw: np.ndarray, dtype: str, truth: np.ndarray, straightforward: np.ndarray) -> None:
    """Checks a kernel's output.

    Args:
        raw: its rows of bytes, of ``dtype`` "f32", "bf16" or "q8".
        truth: float64, not rounded to ``dtype``; rows beyond those of ``raw`` only show what precision costs.
        straightforward: float32 arithmetic of as many rows, not rounded to ``dtype`` either.
    """
    assert np.isfinite(truth).all(), "a case must have a finite answer"
    got = decode(raw, dtype)
    if dtype == "q8":
        assert isinstance(got, Q8)
        step, plain, got = steps_of(truth), quantize_q8(straightforward).values(), got.values()
    else:
        step, plain = np.zeros_like(truth), rounded(straightforward, dtype)
    assert isinstance(got, np.ndarray) and got.shape[1:] == truth.shape[1:] and np.isfinite(got).all()
    if not truth.any():
        assert not got.any()
        return
    floor = ulp("f32" if dtype == "q8" else dtype, float(np.abs(truth).max()))
    allowed = max(FACTOR * excess(plain, truth, step), floor)
    error = excess(got, truth[: len(got)], step[: len(got)])
    assert error <= allowed, f"error {error / rms(truth):.3g} of rms, allowed {allowed / rms(truth):.3g}"


@dataclass(frozen=True)
class Codes:
    """An integer matrix as its format declares it: ``scales * codes + minima``, group by group of 32.

    Attributes:
        codes: [N, K] int32, less the format's zero point.
        scales, minima: [N, K / 32] float32.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray

    @classmethod
    def of(cls, fmt: WeightFormat, data: np.ndarray, n: int) -> Codes:
        """From a file's bytes."""
        groups = data.reshape(n, -1, fmt.group_bytes)
        header = 4 if fmt.has_minimum else 2
        heads = np.ascontiguousarray(groups[:, :, :header]).view("<f2").astype(np.float32)
        body = np.ascontiguousarray(groups[:, :, header:])
        if fmt.bits == 8:
            codes = body.view(np.int8).astype(np.int32)
        else:
            codes = np.concatenate([body & 15, body >> 4], axis=2).astype(np.int32) - fmt.zero
        minima = heads[:, :, 1] if fmt.has_minimum else np.zeros_like(heads[:, :, 0])
        return cls(codes.reshape(n, -1), heads[:, :, 0], minima)

    def interleaved(self, other: Codes) -> Codes:
        """16 rows of this and 16 of the other in turn."""

        def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            blocks = [x.reshape(-1, 1, 16, x.shape[1]) for x in (a, b)]
            return np.concatenate(blocks, axis=1).reshape(-1, a.shape[1])

        return Codes(*(merge(getattr(self, f), getattr(other, f)) for f in ("codes", "scales", "minima")))


def plain_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """x * (1 / sqrt(mean(x^2) + eps)) * w in float32, as model code writes it."""
    inverse = np.float32(1) / np.sqrt(np.mean(x * x, axis=1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return x * inverse * w


def plain_linear(x: np.ndarray | Q8, w: np.ndarray, codes: Codes | None) -> np.ndarray:
    """Float32 accumulation in the order of K: of single products, or of exact integer sums over 32."""
    if isinstance(x, Q8):
        assert codes is not None
        y = np.zeros((len(x.codes), len(w)), np.float32)
        for g in range(x.scales.shape[1]):
            at, scale = slice(32 * g, 32 * g + 32), x.scales[:, g : g + 1]
            dot = x.codes[:, at].astype(np.int32) @ codes.codes[:, at].T
            total = x.codes[:, at].sum(axis=1, keepdims=True, dtype=np.int32)
            y = y + dot.astype(np.float32) * (codes.scales[:, g] * scale)
            y = y + codes.minima[:, g] * (scale * total.astype(np.float32))
        return y
    y = np.zeros((len(x), len(w)), np.float32)
    for k in range(w.shape[1]):
        y = y + x[:, k : k + 1] * w[:, k]
    return y


def plain_gate(y: np.ndarray) -> np.ndarray:
    """silu(gate) * up of columns that alternate every 16."""
    blocks = y.reshape(len(y), -1, 2, 16)
    gate, up = (np.ascontiguousarray(blocks[:, :, i]).reshape(len(y), -1) for i in range(2))
    result: np.ndarray = run_op("silu_mul", [gate, up], {}, np.float32)[0]
    return result


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, scale: float, dtype: str
) -> np.ndarray:
    """Softmax attention of one request in float32, every sum a loop in order.

    Args:
        q: [n, heads, d]; k, v: [c, kv_heads, d] as the cache holds them; positions: [n].
        dtype: of the cache; beside bf16 and int8 queries and probabilities are rounded too.
    """
    group = q.shape[1] // k.shape[1]
    round_to = dtype if dtype in ("bf16", "int8") else "f32"
    q, k, v = rounded_query(q, round_to), np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.zeros((len(q), q.shape[1], len(k)), np.float32)
    for d in range(q.shape[2]):
        scores = scores + q[:, :, None, d] * k[None, :, :, d].transpose(0, 2, 1)
    seen = np.arange(len(k)) <= positions[:, None, None]
    scores = np.where(seen, scores * np.float32(scale), -np.inf).astype(np.float32)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights = rounded_weights(p.transpose(1, 0, 2), v.transpose(1, 0, 2), round_to).transpose(1, 0, 2)
    p = p if dtype == "int8" else weights  # what is summed: int8 weights are rounded together with their values' scales
    total, y = np.zeros_like(scores[:, :, :1]), np.zeros_like(q)
    for t in range(len(k)):
        total = total + p[:, :, t : t + 1]
        y = y + weights[:, :, t : t + 1] * v[t]
    return y / total


def reference(
    op: str,
    inputs: Sequence[Any],
    attrs: Mapping[str, Any],
    context: Any = None,
    codes: Codes | None = None,
    terms: np.ndarray | None = None,
) -> list[tuple[Any, Any]]:
    """(float64 truth, straightforward float32) of each output, before it is quantized.

    ``codes``, ``terms``: what a linear multiplies int8 activations by, or bf16 ones by, if not the weight itself.
    """
    attrs = {k: v for k, v in attrs.items() if k != "quantize"}
    truth = run_op(op, inputs, attrs, np.float64, context)
    if op == "linear":
        y = plain_linear(inputs[0], inputs[1] if terms is None else terms, codes)
        return [(truth[0], plain_gate(y) if attrs.get("epilogue") else y)]
    if op == "rms_norm":
        return [(truth[0], plain_norm(*inputs, attrs["eps"]))]
    if op == "add_rms_norm":
        total = inputs[0] + inputs[1]
        return [(truth[0], total), (truth[1], plain_norm(total, inputs[2], attrs["eps"]))]
    return list(zip(truth, run_op(op, inputs, attrs, np.float32, context), strict=True))
