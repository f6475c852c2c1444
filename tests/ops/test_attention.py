"""Rotary embedding, the paged cache and attention, natively, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ATTENTION_CASES, KV_DTYPES, AttentionCase, seed_of
from ops.accuracy import assert_accurate, decode, plain_attention
from ops.lone import Heads, LoneGraph, NativeGraph, batch_of

from ridgeline.backends.cpu import _native
from ridgeline.backends.reference.cache import PagedCache, StepContext, read
from ridgeline.backends.reference.ops import run_op
from ridgeline.core.types import Batch
from ridgeline.graph.ir import CacheSpec, Graph, Value

ISAS = _native.available_isas()
BLOCK = 16


class LoneAttention:
    """A case as a graph, its steps, and its reference.

    Every token of every request has its own row of random q, k, v; blocks lie anywhere in the cache. The first
    step fills the cache, the second is the one measured.
    """

    def __init__(self, case: AttentionCase) -> None:
        rng = np.random.default_rng(seed_of(case))
        self.case = case
        totals = [cached + new for cached, new in case.requests]
        self.blocks = -(-max(totals) // BLOCK)
        width = (case.heads + 2 * case.kv_heads) * case.head_dim
        self.qkv = rng.standard_normal((sum(totals), width)).astype(np.float32)
        self.qkv[:, : case.heads * case.head_dim] *= case.scale_up
        order = rng.permutation(len(totals) * self.blocks)
        self.tables = order.reshape(len(totals), self.blocks).astype(np.int32)
        self.slots = rng.permutation(len(totals))
        starts = np.cumsum([0, *totals])
        self.fill = self._step([(0, cached, starts[i]) for i, (cached, _) in enumerate(case.requests)], True)
        self.step = self._step([(c, new, starts[i] + c) for i, (c, new) in enumerate(case.requests)], not self.fill)
        self.feed(self.qkv)

    def feed(self, qkv: np.ndarray) -> None:
        """Takes other numbers for q, k and v."""
        self.qkv = qkv
        self.graph = self._graph(len(qkv))

    def _step(self, work: list[tuple[int, int, int]], updates: bool) -> Batch | None:
        """A batch of (position, tokens, first id) for each request with tokens in it."""
        some = [(int(self.slots[r]), at, range(i, i + n)) for r, (at, n, i) in enumerate(work) if n]
        cells = [(int(self.slots[r]), i, b) for r, row in enumerate(self.tables) for i, b in enumerate(row)]
        return batch_of(some, cells if updates else []) if some else None

    def _graph(self, tokens: int) -> LoneGraph:
        c, g = self.case, LoneGraph(tokens, tokens)
        (cache,) = g.cache_group(CacheSpec((0,), "full", 1, BLOCK, c.kv_dtype, c.kv_heads, c.head_dim))
        self.shape = {"num_heads": c.heads, "num_kv_heads": c.kv_heads, "head_dim": c.head_dim}
        self.rope = {**self.shape, "theta": c.theta, "freq_factors": c.freq_factors}
        self.attend = {**self.shape, "scale": c.head_dim**-0.5, "quantize": c.quantize}
        self.q, written = g.emit("rope_kv_write", (g.activation("qkv", self.qkv), g.positions, cache), self.rope)
        self.output = g.attention(self.q, written, **self.attend)
        return g

    def native(self, output: Value, isa: str, threads: int) -> np.ndarray:
        """Raw rows of the measured step."""
        c = self.case
        frequency = c.theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim) / (c.freq_factors or 1.0)
        heads = Heads(c.heads, c.kv_heads, c.head_dim, c.kv_dtype, tuple(float(f) for f in frequency))
        graph: Graph = self.graph.build(logits=output)
        size = {"slots": len(c.requests), "blocks": self.blocks}
        native = NativeGraph(graph, self.graph.values, isa=isa, threads=threads, heads=heads, **size)
        if self.fill:
            native.run(self.fill)
        assert self.step
        return native.run(self.step)

    def expected(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(truth, straightforward) of q after rotation and of attention."""
        c, results = self.case, []
        tables = np.zeros_like(self.tables)
        tables[self.slots] = self.tables
        for dtype in (np.float64, np.float32):
            cache = PagedCache.empty(tables.size, BLOCK, c.kv_heads, c.head_dim, c.kv_dtype, compute=dtype)
            for batch in (self.fill, self.step):
                if batch:
                    context = StepContext.of(batch, [tables])
                    rows = self.qkv[batch.token_ids]
                    q, cache = run_op("rope_kv_write", [rows, batch.positions, cache], self.rope, dtype, context)
            attrs = {**self.attend, "quantize": None}
            results.append((q, run_op("attention", [q, cache], attrs, dtype, context)[0]))
        results[1] = (q, self._straightforward(q, cache, context))
        return list(zip(*results, strict=True))

    def _straightforward(self, q: np.ndarray, cache: PagedCache, context: StepContext) -> np.ndarray:
        c, y = self.case, np.zeros_like(q)
        for b, slot in enumerate(context.slots):
            rows = slice(context.query_starts[b], context.query_starts[b + 1])
            k, v = read(cache, int(slot), int(context.context_lens[b]), context)
            heads = q[rows].reshape(-1, c.heads, c.head_dim)
            out = plain_attention(heads, k, v, context.positions[rows], self.attend["scale"], c.kv_dtype)
            y[rows] = out.reshape(len(out), -1)
        return y


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_attention(case: AttentionCase) -> None:
    lone = LoneAttention(case)
    truth, straightforward = lone.expected()[1]
    for isa in ISAS:
        raw = [lone.native(lone.output, isa, threads) for threads in (1, 2)]
        np.testing.assert_array_equal(raw[0], raw[1])
        assert_accurate(raw[0], lone.output.dtype, truth, straightforward)


@pytest.mark.parametrize("isa", ISAS)
def test_rotated_queries(isa: str) -> None:
    case = AttentionCase(3, 1, 64, "f32", ((0, 40), (600, 2)), freq_factors=(1.0, 4.0) * 16)
    lone = LoneAttention(case)
    truth, straightforward = lone.expected()[0]
    assert_accurate(lone.native(lone.q, isa, 1), "f32", truth, straightforward)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_decode_gives_the_bits_of_prefill(isa: str, kv_dtype: str) -> None:
    """The last token alone (its keys split over threads, or not) and the same token inside a prefill."""
    prefill = LoneAttention(AttentionCase(3, 1, 64, kv_dtype, ((0, 600),)))
    expected = prefill.native(prefill.output, isa, 2)
    for length, threads in ((17, 2), (256, 2), (257, 2), (513, 3), (600, 1), (600, 2), (600, 5)):
        lone = LoneAttention(AttentionCase(3, 1, 64, kv_dtype, ((length - 1, 1),)))
        lone.feed(prefill.qkv[:length])
        np.testing.assert_array_equal(lone.native(lone.output, isa, threads)[0], expected[length - 1])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_what_was_never_written_never_matters(isa: str, kv_dtype: str) -> None:
    """Blocks left behind by another request hold NaN; a masked value is selected away, never multiplied."""
    case = AttentionCase(2, 1, 32, kv_dtype, ((0, 21),))
    lone = LoneAttention(case)
    expected = lone.native(lone.output, isa, 1)
    poisoned = LoneAttention(AttentionCase(2, 1, 32, kv_dtype, ((32, 21),)))
    poisoned.feed(np.concatenate([np.full_like(poisoned.qkv[:32], np.nan), lone.qkv]))
    tokens = range(32, 53)
    poisoned.step = batch_of([(0, 0, tokens)], [])  # the same blocks, now from position 0
    got = poisoned.native(poisoned.output, isa, 1)
    assert np.isfinite(decode(got, "f32")).all()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_never_sees_what_a_later_one_holds(isa: str, bad: float, kv_dtype: str) -> None:
    """Not even where kernels take the rows of several tokens together, and not even NaN or infinity."""
    case = AttentionCase(2, 1, 32, kv_dtype, ((250, 21),))
    lone = LoneAttention(case)
    expected = lone.native(lone.output, isa, 1)
    damaged = lone.qkv.copy()
    damaged[-9, 64:] = bad  # the key and value of the 13th token of the step
    lone.feed(damaged)
    got = lone.native(lone.output, isa, 2)
    np.testing.assert_array_equal(got[:12], expected[:12])
    assert not np.isfinite(decode(got, "f32")[12:]).all()


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no AMX")
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.kv_dtype == "int8"], ids=str)
def test_tiles_give_an_int8_cache_the_bits_of_registers(case: AttentionCase) -> None:
    lone = LoneAttention(case)
    amx, avx512 = (lone.native(lone.output, isa, 2) for isa in ("amx", "avx512"))
    np.testing.assert_array_equal(amx, avx512)


@pytest.mark.parametrize("what", ["queries", "keys", "values"])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_not_lost_in_an_int8_cache(isa: str, dim: int, what: str) -> None:
    """Codes hold no NaN, so their scale must: damaged numbers must not turn into plausible ones."""
    lone = LoneAttention(AttentionCase(2, 1, dim, "int8", ((0, 21),)))
    lone.qkv[7, {"queries": 5, "keys": 2 * dim + 6, "values": 3 * dim + 4}[what]] = np.nan
    lone.feed(lone.qkv)
    got = decode(lone.native(lone.output, isa, 2), "f32")
    assert np.isfinite(got[:7]).all()
    if what == "queries":
        assert np.isnan(got[7, :dim]).all() and np.isfinite(got[7:, dim:]).all() and np.isfinite(got[8:]).all()
    else:
        assert np.isnan(got[7:]).all()


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_magnitudes_in_an_int8_cache(isa: str, dim: int) -> None:
    """Rows of zeros, of numbers too small to invert, and of large ones give finite results near the truth."""
    case = AttentionCase(2, 1, dim, "int8", ((0, 40),))
    lone = LoneAttention(case)
    scale = np.array([0.0, 1e-44, 1e-30, 1.0, 1e15], np.float32)[np.arange(40) % 5]
    lone.qkv[:, 3 * dim :] *= scale[:, None]
    lone.qkv[::4, 2 * dim : 3 * dim] *= 0.0
    lone.feed(lone.qkv)
    truth, straightforward = lone.expected()[1]
    assert_accurate(lone.native(lone.output, isa, 2), "f32", truth, straightforward)


def test_the_reference_of_attention_is_not_the_kernel() -> None:
    """The rule can fail: attention over one key too few is far outside what precision costs."""
    lone = LoneAttention(AttentionCase(2, 1, 32, "f32", ((4, 1),)))
    truth, straightforward = lone.expected()[1]
    wrong = LoneAttention(AttentionCase(2, 1, 32, "f32", ((3, 1),)))
    wrong.feed(lone.qkv[1:])
    raw = wrong.native(wrong.output, ISAS[0], 1)
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(raw, "f32", truth, straightforward)
