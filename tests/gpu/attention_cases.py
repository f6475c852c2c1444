"""Attention over a paged cache: the cases of tests/cases.py and those only GPU kernels have (windows, caps, pages).

The cache is filled directly: the write of keys and values, and rope, are another operator's. What no request owns, and
what lies in a request's last page after its context, is NaN or infinite, in scales too.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.kernels.attention_decode import attention_decode, workspace
from ridgeline.backends.cuda.kernels.attention_prefill import attention_prefill
from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from ridgeline.backends.reference.numerics import rounded
from tests.cases import ATTENTION_CASES, AttentionCase

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
MOST_CONTEXT = 700


@dataclass(frozen=True)
class PagedCase:
    """Attention as a GPU does it.

    Attributes:
        op: the kernel's file.
        requests: (tokens in the cache before the step, tokens of the step) of each.
        page: tokens of a page.
        window, soft_cap: as the launchers take them.
        cache: "": of ``dtype``; "int8" or "fp8".
        split: requests of more tokens than that are the prefill kernel's, the others the decode kernel's if ``op`` is
            that, or no one's and stay 0; 0: all are those of ``op``.
        splits: programs that share a request's chunks in the decode kernel; 0: as the launcher says.
        scale_up: factor on queries: large ones make the softmax sharp.
    """

    op: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    requests: tuple[tuple[int, int], ...]
    page: int = 16
    window: int | None = None
    soft_cap: float | None = None
    scale_up: float = 1.0
    cache: str = ""
    split: int = 0
    splits: int = 0
    seed: int = field(default=0)

    @property
    def name(self) -> str:
        """For test ids."""
        work = "_".join(f"{cached}+{new}" for cached, new in self.requests[:3])
        more = f"_and{len(self.requests) - 3}" if len(self.requests) > 3 else ""
        extra = f"-page{self.page}" if self.page != 16 else ""
        extra += f"-window{self.window}" if self.window else ""
        extra += f"-cap{self.soft_cap:g}" if self.soft_cap else ""
        extra += f"-up{self.scale_up:g}" if self.scale_up != 1 else ""
        extra += f"-{self.cache}" if self.cache else ""
        extra += f"-split{self.split}" if self.split else ""
        extra += f"-splits{self.splits}" if self.splits else ""
        return f"{self.op}-{self.heads}x{self.kv_heads}x{self.head_dim}-{self.dtype}-{work}{more}{extra}"


KERNELS = ("attention_prefill", "attention_decode")


def _shared() -> list[PagedCase]:
    """Those of tests/cases.py: a long prompt by the prefill kernel, few tokens by both, in turn."""
    cases: list[PagedCase] = []
    for c in ATTENTION_CASES:
        if c.kv_dtype not in TORCH or c.quantize or c.freq_factors:
            continue  # what is quantized, and rope, do not concern the kernel
        most = max(new for _, new in c.requests)
        if most > 60:
            c = AttentionCase(c.heads, c.kv_heads, c.head_dim, c.kv_dtype, ((0, 150),))
        ops = KERNELS[:1] if most > 60 else KERNELS[1:] if most == 1 else KERNELS
        shape = (c.heads, c.kv_heads, c.head_dim, c.kv_dtype, c.requests)
        cases += [PagedCase(op, *shape, scale_up=c.scale_up) for op in ops]
    return cases


def _own() -> list[PagedCase]:
    cases = []
    mixed = ((0, 3), (254, 2), (256, 1), (511, 3))
    for op in KERNELS:
        for dim, dtype in ((64, "bf16"), (96, "bf16"), (128, "f16"), (192, "bf16"), (256, "bf16")):
            cases.append(PagedCase(op, 2, 1, dim, dtype, ((300, 2),), soft_cap=20.0, scale_up=8.0))
            cases.append(PagedCase(op, 2, 2, dim, dtype, ((0, 1), (270, 3)), window=40))
        for page in (8, 32, 64, 256):
            cases.append(PagedCase(op, 4, 2, 32, "bf16", mixed, page))
        for window in (1, 16, 100, 256, 300, 1000):
            cases.append(PagedCase(op, 4, 2, 32, "bf16", mixed, window=window))
        cases.append(PagedCase(op, 4, 2, 32, "f16", mixed, window=70, soft_cap=5.0, scale_up=4.0))
        cases.append(PagedCase(op, 8, 1, 32, "bf16", ((0, 0), (250, 13), (0, 0), (3, 1))))
        cases.append(PagedCase(op, 5, 1, 32, "bf16", ((40, 30), (699, 1))))
        for cache in ("int8", "fp8"):
            cases.append(PagedCase(op, 4, 2, 32, "bf16", ((0, 3), (254, 2)), 32, cache=cache))
            cases.append(PagedCase(op, 2, 2, 48, "f16", ((270, 3),), 8, 40, 5.0, 2.0, cache=cache))
            cases += [PagedCase(op, 4, 1, dim, "bf16", ((254, 3),), cache=cache) for dim in (64, 128)]
    return cases


MIXED = PagedCase("attention_decode", 4, 2, 32, "bf16", ((0, 4), (255, 1), (0, 0), (250, 40), (3, 5)), split=4)
SPLITS = [
    PagedCase("attention_decode", 2, 1, 48, "bf16", ((600, 1), (0, 2)), splits=1),
    PagedCase("attention_decode", 2, 2, 32, "f16", ((690, 2),), window=400, splits=2),
]
CASES: list[PagedCase] = [*_shared(), *_own(), MIXED, replace(MIXED, op="attention_prefill"), *SPLITS]


def kernels_of(case: PagedCase) -> tuple[str, ...]:
    """The kernel files that a case runs."""
    return KERNELS if case.split and case.op == "attention_decode" else (case.op,)


KERNELS_OF = kernels_of


@dataclass(frozen=True)
class Step:
    """A case's tensors; queries, keys and values [tokens, heads, head_dim] of each request as fp32 numbers."""

    case: PagedCase
    queries: list[np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    args: dict[str, Any]


def numbers(case: PagedCase) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Queries, keys and values of every request's whole context, rounded to the case's type."""
    rng = np.random.default_rng(case.seed or zlib.crc32(case.name.encode()))
    lengths, dim = [cached + new for cached, new in case.requests], case.head_dim
    heads = (case.heads, case.kv_heads, case.kv_heads)
    rows = [[rng.standard_normal((n, h, dim)).astype(np.float32) for n in lengths] for h in heads]
    rows[0] = [x * np.float32(case.scale_up) for x in rows[0]]
    q, k, v = ([_round(x, case.dtype) for x in some] for some in rows)
    if case.cache:
        k, v = ([quantized(x, case, which)[2] for x in some] for which, some in enumerate((k, v)))
    return q, k, v


TENSOR_SCALES = (0.5, 0.03125)
"""Of fp8 caches: powers of two, so that the numbers that codes stand for are quantized to the same codes again."""


def quantized(x: np.ndarray, case: PagedCase, which: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """[tokens, heads, dim] as rope_kv keeps it: codes, scales [tokens, heads], the numbers that they stand for."""
    if case.cache == "fp8":
        codes = torch.from_numpy(x / np.float32(TENSOR_SCALES[which])).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, np.zeros(x.shape[:2], np.float32), codes.to(torch.float32).numpy() * TENSOR_SCALES[which]
    scales = np.abs(x).max(axis=2) / np.float32(127)
    codes = torch.from_numpy(np.rint(x / np.maximum(scales, 1e-30)[..., None])).to(torch.int8)
    return codes, scales, codes.to(torch.float32).numpy() * scales[..., None]


def poison(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    """What no one may see: NaN and infinities of both signs, or the largest codes."""
    if not kind.is_floating_point:
        return torch.full(shape, -128, dtype=kind)
    values = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return values.repeat(-(-int(np.prod(shape)) // 3))[: int(np.prod(shape))].reshape(shape).to(kind)


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    result: np.ndarray = torch.from_numpy(np.ascontiguousarray(x)).to(TORCH[dtype]).to(torch.float32).numpy()
    return result


def step_of(case: PagedCase, data: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] | None = None) -> Step:
    """The tensors of a case, of given numbers or its own."""
    q, k, v = data or numbers(case)
    kind, page = TORCH[case.dtype], case.page
    new = [n for _, n in case.requests]
    lengths = np.array([cached + n for cached, n in case.requests])
    rng = np.random.default_rng(len(lengths))
    width, slots = int(-(-lengths.max() // page)), len(lengths) + 2
    order = rng.permutation(slots * width + 3)
    tables = np.full((slots, width), -1, np.int32)  # what is not in use is no block
    owners = rng.permutation(slots)[: len(lengths)].astype(np.int32)
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(case.cache, kind)
    caches = [poison((len(order), case.kv_heads, page, case.head_dim), stored) for _ in (k, v)]
    scales = [poison((len(order), case.kv_heads, page), torch.float32) for _ in (k, v)]
    for i, slot in enumerate(owners):
        blocks = -(-int(lengths[i]) // page)
        tables[slot, :blocks] = order[i * width : i * width + blocks]
        at = np.arange(lengths[i])
        place = torch.from_numpy(tables[slot][at // page]).long(), slice(None), torch.from_numpy(at % page)
        for which, x in enumerate((k[i], v[i])):
            if case.cache:
                codes, factors, _ = quantized(x, case, which)
                caches[which].view(torch.uint8)[place] = codes.view(torch.uint8)
                scales[which][place] = torch.from_numpy(factors)
            else:
                caches[which][place] = torch.from_numpy(x).to(kind)
        if case.window:  # blocks before the window may have been given to others
            tables[slot, : max(case.requests[i][0] - case.window + 1, 0) // page] = -1
    queries = [x[len(x) - n :] for x, n in zip(q, new, strict=True)]
    padded = torch.full((sum(new), case.heads + 1, case.head_dim), float("nan"), dtype=kind)  # strides matter
    padded[:, : case.heads] = torch.from_numpy(np.concatenate(queries)).to(kind)
    args = {
        "q": padded[:, : case.heads],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "block_tables": torch.from_numpy(tables),
        "slots": torch.from_numpy(owners),
        "query_starts": torch.from_numpy(np.cumsum([0, *new]).astype(np.int32)),
        "context_lens": torch.from_numpy(lengths.astype(np.int32)),
        "out": torch.zeros(sum(new), case.heads, case.head_dim, dtype=kind),
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
    }
    if case.cache == "int8":
        args["scales"] = (scales[0], scales[1])
    if case.cache == "fp8":
        args["tensor_scales"] = TENSOR_SCALES
    return Step(case, queries, k, v, args)


def launches_of(step: Step, arch: str) -> list[Any]:
    """The launches of a step, with a workspace of NaN where the kernel needs one."""
    c, args = step.case, step.args
    prefill = attention_prefill(**args, longer_than=c.split, arch=arch)
    if c.op == "attention_prefill":
        return prefill
    most = int(args["context_lens"].max())
    sizes = workspace(len(args["q"]), len(c.requests), c.heads, c.kv_heads, c.head_dim, most, arch)
    partials, stats = (torch.full(size, float("nan")) for size in sizes[:2])
    counters = torch.zeros(sizes[2], dtype=torch.int32)
    scratch = {"partials": partials, "stats": stats, "counters": counters, "max_context": most}
    decode = attention_decode(**args, **scratch, up_to=c.split or None, arch=arch)
    if c.splits:
        args = {**decode[0].args, "splits": c.splits}
        decode = [replace(decode[0], grid=(*decode[0].grid[:2], c.splits), args=args)]
    return prefill + decode if c.split else decode


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, case: PagedCase, kind: type, dtype: str | None = None
) -> np.ndarray:
    """One request's q [n, heads, d], its last tokens, over its k, v [c, kv_heads, d].

    ``kind``: what is computed in; ``dtype``: what probabilities are rounded to before they weigh values.
    """
    group = case.heads // case.kv_heads
    q, k, v = (x.astype(kind) for x in (q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)))
    scores = np.einsum("nhd,chd->hnc", q, k) * kind(case.head_dim**-0.5)
    if case.soft_cap:
        scores = kind(case.soft_cap) * np.tanh(scores / kind(case.soft_cap))
    keys, at = np.arange(len(k)), np.arange(len(k) - len(q), len(k))[:, None]
    seen = (keys <= at) & (keys > at - (case.window or len(k) + 1))
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True)).astype(kind)
    if dtype:
        p = _round(p, dtype) if dtype == "f16" else rounded(p, dtype)
    y: np.ndarray = np.einsum("hnc,chd->nhd", p, v) / p.sum(axis=2).T[:, :, None]
    return y


def expected_of(step: Step) -> Expected:
    """Truth and straightforward numbers of a step's output."""
    case, both = step.case, zip(step.queries, step.keys, step.values, strict=True)
    rows: Sequence[tuple[np.ndarray, np.ndarray]] = [
        (attend(q, k, v, case, np.float64), attend(q, k, v, case, np.float32, case.dtype)) for q, k, v in both if len(q)
    ]
    truth, plain = (np.concatenate(x) for x in zip(*rows, strict=True))
    if case.split and case.op == "attention_prefill":
        lengths = np.repeat([n for _, n in case.requests], [n for _, n in case.requests])
        truth[lengths <= case.split] = plain[lengths <= case.split] = 0.0
    return Expected(step.args["out"], truth, plain)


def build(case: PagedCase, arch: str) -> Climb:
    """Tensors, launches and the answer of a case; the decode kernel's counters are 0 again at its end."""
    step = step_of(case)
    launches = launches_of(step, arch)
    expected = [expected_of(step)]
    if "counters" in launches[-1].args:
        counters = launches[-1].args["counters"]
        zeros = np.zeros(counters.shape)
        expected.append(Expected(counters, zeros, zeros.astype(np.float32), exact=True))
    return Climb(launches, tuple(expected))
