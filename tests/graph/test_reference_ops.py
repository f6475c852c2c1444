"""Operators of the reference against definitions written another way."""

import ml_dtypes
import numpy as np
import pytest

from ridgeline.backends.reference.cache import PagedCache, StepContext
from ridgeline.backends.reference.numerics import quantize_q8, rounded
from ridgeline.backends.reference.ops import KERNELS, rotate, run_op
from ridgeline.graph.ops import OPS

RNG = np.random.default_rng(0)


def test_every_declared_operator_has_a_reference():
    assert set(KERNELS) == set(OPS)


def test_q8_is_the_nearest_code_from_minus_112_to_127():
    x = (RNG.standard_normal((5, 96)) * 10.0 ** RNG.integers(-20, 20, (5, 1))).astype(np.float32)
    x[1, 32:64] = 0
    q = quantize_q8(x)
    groups = x.reshape(5, 3, 32)
    top, bottom = groups.max(axis=2), -groups.min(axis=2)  # both are positive, or 0 in the group of zeros
    steps = np.maximum(np.maximum(top, bottom) / 127, np.minimum(top, bottom) / 112)
    np.testing.assert_allclose(q.scales, np.where(bottom > top, -steps, steps), rtol=3e-7)
    assert q.codes.max() == 127 and q.codes.min() >= -112 and (q.codes[1, 32:64] == 0).all()
    step = np.repeat(np.abs(q.scales), 32, axis=1)
    assert (np.abs(q.values(np.float64) - x) <= 0.5001 * step).all()
    halves = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 26], np.float32)
    assert quantize_q8(halves).codes[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    turned, both = quantize_q8(-halves), quantize_q8(np.array([[112.0, -112.0] + [56.0] * 30], np.float32))
    assert turned.codes[0, :6].tolist() == [127, 0, 2, 2, 0, -2] and turned.scales[0, 0] == -1
    assert both.codes[0, :3].tolist() == [112, -112, 56]


@pytest.mark.parametrize("dtype, stored", [("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f32", np.float32)])
def test_rounding_is_idempotent_and_representable(dtype, stored):
    x = RNG.standard_normal(1000).astype(np.float32)
    once = rounded(x, dtype)
    np.testing.assert_array_equal(once.astype(stored).astype(np.float32), once)
    np.testing.assert_array_equal(rounded(once, dtype), once)


def test_rotation_is_a_complex_product():
    x = RNG.standard_normal((4, 2 * 8))
    positions = np.array([0, 1, 7, 1000], np.int32)
    factors = (1.0, 2.0, 4.0, 8.0)
    y = rotate(x, positions, 8, 10000.0, factors)
    for t, p in enumerate(positions):
        for head in range(2):
            for i in range(4):
                angle = p * 10000.0 ** (-2 * i / 8) / factors[i]
                a = complex(x[t, head * 8 + i], x[t, head * 8 + i + 4]) * np.exp(1j * angle)
                assert y[t, head * 8 + i] == pytest.approx(a.real) and y[t, head * 8 + i + 4] == pytest.approx(a.imag)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_reads_each_requests_own_past(window):
    heads, kv_heads, dim, size = 4, 2, 8, 4
    lens, new = [9, 0, 6, 1], [3, 0, 6, 1]  # one request of no tokens
    tables = np.array([[3, 0, 7], [9, 9, 9], [5, 1, 9], [2, 9, 9]], np.int32)
    positions = np.concatenate([np.arange(c - n, c) for c, n in zip(lens, new, strict=True)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    context = StepContext(positions, np.arange(4, dtype=np.int32), starts, np.array(lens, np.int32), [tables])
    cache = PagedCache.empty(10, size, kv_heads, dim, "f32", compute=np.float64)
    keys, values = {}, {}
    for slot, length in enumerate(lens):
        for p in range(length):
            block = tables[slot, p // size]
            keys[slot, p] = cache.k[block, p % size] = RNG.standard_normal((kv_heads, dim))
            values[slot, p] = cache.v[block, p % size] = RNG.standard_normal((kv_heads, dim))
    q = RNG.standard_normal((sum(new), heads * dim))
    attrs = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "scale": 0.3, "window": window}
    (y,) = run_op("attention", (q, cache), attrs, np.float64, context)
    row_slots = context.token_slots()
    for t, p in enumerate(positions):
        for h in range(heads):
            seen = [j for j in range(p + 1) if window is None or j > p - window]
            mine = q[t, h * dim : (h + 1) * dim]
            e = np.exp([0.3 * mine @ keys[row_slots[t], j][h // 2] for j in seen])
            expected = sum(w * values[row_slots[t], j][h // 2] for w, j in zip(e / e.sum(), seen, strict=True))
            np.testing.assert_allclose(y[t, h * dim : (h + 1) * dim], expected, rtol=1e-10)


def test_concat_undoes_split():
    x = RNG.standard_normal((3, 10))
    parts = run_op("split", (x,), {"sizes": (4, 5, 1)}, np.float64)
    assert [p.shape[1] for p in parts] == [4, 5, 1]
    np.testing.assert_array_equal(run_op("concat", parts, {}, np.float64)[0], x)


def test_interleaved_columns_alternate_by_sixteen():
    x = np.arange(64)[None, :].astype(np.float64)
    gate, up = run_op("split", (x,), {"sizes": (32, 32), "interleave": 16}, np.float64)
    assert gate[0].tolist() == [*range(16), *range(32, 48)] and up[0].tolist() == [*range(16, 32), *range(48, 64)]
