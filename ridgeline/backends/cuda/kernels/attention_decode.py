"""Attention of few query tokens over a paged cache: split over keys as Flash-Decoding (Dao et al., 2023), one launch.

A program takes the rows of a request and a KV head (query tokens times grouped heads, so that speculated tokens share
the keys' reads) and every n-th chunk of 256 absolute positions. A chunk's partial (m, l, o) goes to a workspace; the
program that arrives last at the rows' counter folds the partials in chunk order. Both come from the prefill kernel,
whose text says why a row's bits are the same here and there; how many programs share a request's chunks cannot matter.

Rows are padded to 16 on Ampere, where four warps share the keys and the value columns. Hopper's wgmma takes 64 rows at
least: there scores and values are computed turned (``attend_turned``), so that keys are the 64, and 16 rows will do.
Over an 8-bit cache a tile has 32 keys (more would spill in prefill, whose tiles they share), and 64 rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.kernels.attention_prefill import (
    CHUNK,
    PLAIN,
    add,
    attend,
    cache_bytes,
    common_args,
    find_tile,
    key_bytes,
    meta_tensors,
    operand,
    seen_by,
    shape_of,
    tiles,
    weights_of,
)
from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

PROGRAMS = {"sm_80": 16 * 108, "sm_90": 16 * 132}
"""How many programs a launch is split into at least, if its requests have so many chunks."""

WGMMA_ROWS, FEW_ROWS = 64, 16
"""Rows of a Hopper tensor-core instruction, and of the least tile of queries."""

MERGE_ROWS = 8
"""Rows that the last program folds at a time: enough for the heads of a KV head of most models."""


@triton.jit
def fold(
    partials,
    stats,
    entries,
    chunks,
    to,
    live,
    v_scale,
    column,
    WIDTH: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Folds the partials of ROWS rows in chunk order and stores them, columns [column, column + V)."""
    at = column + tl.arange(0, V)[None, :]
    m_all = tl.full([ROWS], float("-inf"), tl.float32)
    l_all = tl.zeros([ROWS], tl.float32)
    o_all = tl.zeros([ROWS, V], tl.float32)
    # Several chunks' loads are under way at once: the fold waits for memory, not for arithmetic.
    for chunk in tl.range(0, chunks, loop_unroll_factor=4):
        entry = entries + chunk
        m = tl.load(stats + 2 * entry, mask=live, other=float("-inf"), cache_modifier=".cg")
        l = tl.load(stats + 2 * entry + 1, mask=live, other=0.0, cache_modifier=".cg")
        o = tl.load(partials + entry[:, None] * WIDTH + at, mask=live[:, None], other=0.0, cache_modifier=".cg")
        m_all, before, now = weights_of(m_all, m)
        l_all = add(l_all, before, l, now)
        o_all = add(o_all, before[:, None], o, tl.broadcast_to(now[:, None], o.shape))
    result = o_all * (v_scale / l_all)[:, None]
    tl.store(to[:, None] + at, result.to(to.dtype.element_ty), mask=live[:, None])


@triton.jit
def attend_turned(
    q1, q2, k_head, v_head, k_scales, v_scales, table, start, low, high, positions, m, l, o1, o2,
    block_stride, token_stride, scale_stride, scale, cap_scale, window,
    D1: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """``attend`` with keys and values as the tensor cores' first operand: scores [BLOCK_N, M], o1 [D1, M], l [16, M].

    The same sums of the same products in the same order; wgmma's 64 rows are keys and columns of values, its least of
    8 columns the rows of a few query heads.
    """
    keys = start + tl.arange(0, BLOCK_N)
    seen = (keys >= low) & (keys < high)
    blocks = tl.load(table + keys // PAGE, mask=seen, other=0).to(tl.int64)
    at = (blocks * block_stride + (keys % PAGE) * token_stride)[:, None]
    live = seen[:, None]
    k = tl.load(k_head + at + tl.arange(0, D1)[None, :], mask=live, other=0)
    s = tl.dot(operand(k, KIND, q1.dtype), tl.trans(q1))
    if D2 > 0:
        k = tl.load(k_head + at + (D1 + tl.arange(0, D2)[None, :]), mask=live, other=0)
        s = tl.dot(operand(k, KIND, q1.dtype), tl.trans(q2), s)
    if KIND == 1:
        scale_at = blocks * scale_stride + keys % PAGE
        s = s * tl.load(k_scales + scale_at, mask=seen, other=0.0)[:, None]
    if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1); scale is then the cap's
        s = tl.fma(1.0 / (tl.exp2(s * cap_scale) + 1.0), -2.0, 1.0)
    row, last = tl.arange(0, BLOCK_N)[:, None], (positions - start)[None, :]
    visible = row <= last
    if HAS_WINDOW:
        visible = visible & (row > last - window)
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=0) * scale)
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(s, tl.full(s.shape, scale, tl.float32), tl.broadcast_to(-reference[None, :], s.shape)))
    weights = p.to(q1.dtype)
    alpha = tl.exp2(m - reference)
    l = tl.dot(tl.full([16, BLOCK_N], 1.0, q1.dtype), weights, l * alpha[None, :])
    if KIND == 1:
        weights = (p * tl.load(v_scales + scale_at, mask=seen, other=0.0)[:, None]).to(q1.dtype)
    v = tl.load(v_head + at + tl.arange(0, D1)[None, :], mask=live, other=0)
    o1 = tl.dot(tl.trans(operand(v, KIND, q1.dtype)), weights, o1 * alpha[None, :])
    if D2 > 0:
        v = tl.load(v_head + at + (D1 + tl.arange(0, D2)[None, :]), mask=live, other=0)
        o2 = tl.dot(tl.trans(operand(v, KIND, q1.dtype)), weights, o2 * alpha[None, :])
    return m_new, l, o1, o2


@triton.jit(do_not_specialize=["requests", "up_to", "splits", "max_chunks", "table_stride", "window"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    block_tables,
    slots,
    query_starts,
    context_lens,
    out,
    partials,
    stats,
    counters,
    requests,
    up_to,
    splits,
    max_chunks,
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    scale_stride,
    scale_head_stride,
    scale,
    cap_scale,
    v_scale,
    window,
    GROUP: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Program (tile, KV head, split): chunks split, split + splits, ... of those that the tile's rows see."""
    STEPS: tl.constexpr = CHUNK // BLOCK_N
    request, tile = find_tile(tl.program_id(0), query_starts, requests, GROUP, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(query_starts + request)
    tokens = tl.load(query_starts + request + 1) - first
    if (tile * BLOCK_M >= tokens * GROUP) | (tokens > up_to):
        return
    cached = tl.load(context_lens + request) - tokens
    high = cached + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1) + 1
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(cached + tile * BLOCK_M // GROUP - window + 1, 0)
    first_chunk = low // CHUNK
    chunks = tl.cdiv(high, CHUNK) - first_chunk
    if split >= chunks:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // GROUP
    live = rows < tokens * GROUP
    head = kv_head * GROUP + rows % GROUP
    from_q = q + ((first + token).to(tl.int64) * q_stride + head * q_head_stride)[:, None]
    q1 = tl.load(from_q + tl.arange(0, D1)[None, :], mask=live[:, None], other=0.0)
    q2 = q1
    if D2 > 0:
        q2 = tl.load(from_q + (D1 + tl.arange(0, D2)[None, :]), mask=live[:, None], other=0.0)
    entries = ((first + token).to(tl.int64) * (tl.num_programs(1) * GROUP) + head) * max_chunks
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if TURNED:
        l = tl.zeros([16, BLOCK_M], tl.float32)
        o1 = tl.zeros([D1, BLOCK_M], tl.float32)
        o2 = tl.zeros([D2 if D2 > 0 else 16, BLOCK_M], tl.float32)
    else:
        l = tl.zeros([BLOCK_M, 8], tl.float32)
        o1 = tl.zeros([BLOCK_M, D1], tl.float32)
        o2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    k_head = k_cache + kv_head.to(tl.int64) * head_stride
    v_head = v_cache + kv_head.to(tl.int64) * head_stride
    k_scales, v_scales = k_scales + kv_head * scale_head_stride, v_scales + kv_head * scale_head_stride
    table = block_tables + tl.load(slots + request).to(tl.int64) * table_stride
    for step in range(0, tl.cdiv(chunks - split, splits) * STEPS):  # one loop, so that loads run ahead over chunks
        chunk = split + step // STEPS * splits
        start = (first_chunk + chunk) * CHUNK + step % STEPS * BLOCK_N
        if TURNED:
            m, l, o1, o2 = attend_turned(
                q1, q2, k_head, v_head, k_scales, v_scales, table, start, low, high, cached + token, m, l, o1, o2,
                block_stride, token_stride, scale_stride, scale, cap_scale, window,
                D1, D2, PAGE, BLOCK_N, KIND, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
        else:
            m, l, o1, o2 = attend(
                q1, q2, k_head, v_head, k_scales, v_scales, table, start, low, high, cached + token, m, l, o1, o2,
                block_stride, token_stride, scale_stride, scale, cap_scale, window,
                D1, D2, D1, D2, PAGE, BLOCK_N, KIND, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
        if (step + 1) % STEPS == 0:
            entry = entries + chunk
            tl.store(stats + 2 * entry, m, mask=live)
            tl.store(stats + 2 * entry + 1, tl.max(l, axis=0 if TURNED else 1), mask=live)
            to = partials + entry[:, None] * (D1 + D2)
            tl.store(to + tl.arange(0, D1)[None, :], o1.T if TURNED else o1, mask=live[:, None])
            if D2 > 0:
                tl.store(to + (D1 + tl.arange(0, D2)[None, :]), o2.T if TURNED else o2, mask=live[:, None])
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the next tile counts the rest of the partial 0 times
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    counter = counters + tl.program_id(0) * tl.num_programs(1) + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.minimum(splits, chunks) - 1:
        tl.store(counter, 0)
        for base in range(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, tokens * GROUP), MERGE_ROWS):
            row = base + tl.arange(0, MERGE_ROWS)
            at, of = (first + row // GROUP).to(tl.int64), kv_head * GROUP + row % GROUP
            entry = (at * (tl.num_programs(1) * GROUP) + of) * max_chunks
            to = out + at * out_stride + of * out_head_stride
            alive = row < tokens * GROUP
            fold(partials, stats, entry, chunks, to, alive, v_scale, 0, D1 + D2, D1, MERGE_ROWS)
            if D2 > 0:
                fold(partials, stats, entry, chunks, to, alive, v_scale, D1, D1 + D2, D2, MERGE_ROWS)


def _turned(head_dim: int) -> tuple[int, int, int]:
    """Rows, warps and stages of a tile whose keys are the tensor cores' first operand."""
    return FEW_ROWS, 4 if head_dim <= 128 else 8, 3


def workspace(
    tokens: int, requests: int, heads: int, kv_heads: int, head_dim: int, max_context: int, arch: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``partials`` (fp32), ``stats`` (fp32) and ``counters`` (int32) of a launch.

    Counters are 0 before the first launch, and again after each.
    """
    chunks = cdiv(max_context, CHUNK)
    count = tiles(tokens, requests, heads // kv_heads, FEW_ROWS) * kv_heads  # with more rows a tile, fewer
    return (tokens * heads * chunks, head_dim), (tokens * heads * chunks, 2), (count,)


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    stats: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    max_context: int,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tensor_scales: tuple[float, float] = (1.0, 1.0),
    up_to: int | None = None,
    few: int | None = None,
    arch: str = "sm_90",
) -> list[Launch]:
    """Causal attention of each request's last tokens over its context, as ``attention_prefill`` with the same bits.

    Args:
        q, k_cache, v_cache, block_tables, slots, query_starts, context_lens, out, scale, window, soft_cap, scales,
            tensor_scales: as there.
        partials, stats, counters: the shapes that ``workspace`` gives, or larger; counters all 0.
        max_context: no context_lens is above it.
        up_to: requests of more tokens than that in this step are left to the prefill kernel.
        few: requests of at most ``up_to`` tokens come first and have so many tokens at most, all together: what the
            workspace is for; None: as many as there are.

    Raises:
        ValueError: a head size, a page or strides that the kernel cannot do, or too small a workspace.
    """
    tokens, heads, head_dim = q.shape
    requests, kv_heads = slots.shape[0], k_cache.shape[1]
    shape = shape_of(head_dim, arch)
    tokens = tokens if few is None else min(few, tokens)
    needed = workspace(tokens, requests, heads, kv_heads, head_dim, max_context, arch)
    for tensor, least in zip((partials, stats, counters), needed, strict=True):
        if tensor.numel() < torch.Size(least).numel() or not tensor.is_contiguous():
            raise ValueError(f"attention_decode: a workspace of {tuple(tensor.shape)}, {least} needed")
    tables = (block_tables, slots, query_starts, context_lens)
    args, meta = common_args(q, k_cache, v_cache, tables, out, scale, window, soft_cap, scales, tensor_scales)
    keys = shape.keys[meta["KIND"] != PLAIN]
    turned = arch == "sm_90" and keys >= WGMMA_ROWS
    rows, warps, stages = _turned(head_dim) if turned else (shape.decode[0], *shape.decode[2:])
    count = tiles(tokens, requests, heads // kv_heads, rows)
    chunks = cdiv(max_context, CHUNK)
    splits = max(1, min(chunks, cdiv(PROGRAMS[arch], count * kv_heads)))
    args |= {"partials": partials, "stats": stats, "counters": counters, "max_chunks": chunks, "splits": splits}
    args["up_to"] = (1 << 30) if up_to is None else up_to
    meta |= {"BLOCK_M": rows, "BLOCK_N": keys, "MERGE_ROWS": MERGE_ROWS, "TURNED": turned}
    written, updated = (("out",), ()) if up_to is None else ((), ("out",))
    updated = (*updated, "partials", "stats", "counters")
    return [Launch(decode_kernel, (count, kv_heads, splits), args, Config(meta, warps, stages), written, updated)]


def traffic(launch: Launch, requests: Sequence[tuple[int, int]]) -> int:
    """Bytes that the programs' loads and stores ask for, as in ``attention_prefill``; the atomic is not counted."""
    meta, args = launch.config.meta, launch.args
    item, dim = args["q"].element_size(), meta["D1"] + meta["D2"]
    total = math.prod(launch.grid) * (4 * len(requests) + 12)
    for cached, new in (r for r in requests if r[1] <= args["up_to"]):
        for rows, low, high in seen_by(launch, cached, new):
            chunks = cdiv(high, CHUNK) - low // CHUNK
            once = launch.grid[2] * 4 + min(launch.grid[2], chunks) * (4 + rows * item * dim)
            written = rows * chunks * (8 + 4 * dim)
            folded = written + rows * (item * dim + chunks * 8 * (meta["D2"] > 0))
            total += launch.grid[1] * (once + (high - low) * key_bytes(launch, dim) + written + folded + 4)
    return total


def card_shapes(arch: str) -> list[CardShape]:
    """One new token of 1 and of 64 requests at a context of 4,096 in an 8B Llama, other head sizes and caches."""
    shapes, context = [], 4096
    plain = ((1, 128, ""), (64, 128, ""), (64, 64, ""), (64, 256, ""))
    for requests, dim, cache in (*plain, *((m, 128, cache) for cache in ("int8", "fp8") for m in (1, 64))):
        tensors: dict[str, Any] = meta_tensors(requests, 1, context, dim, cache)
        sizes = workspace(requests, requests, 32, 8, dim, context, arch)
        for name, size in zip(("partials", "stats", "counters"), sizes, strict=True):
            kind = torch.int32 if name == "counters" else torch.float32
            tensors[name] = torch.empty(size, dtype=kind, device="meta")
        launches = attention_decode(**tensors, scale=dim**-0.5, max_context=context, arch=arch)
        moved = requests * (context * cache_bytes(dim, cache) + 2 * 32 * dim * 2)
        work, name = 4.0 * requests * 32 * dim * context, f"M={requests} D={dim} {cache}".strip()
        asked = traffic(launches[0], [(context - 1, 1)] * requests)
        tiles_of, heads, _ = launches[0].grid
        padded = 4.0 * tiles_of * heads * launches[0].config.meta["BLOCK_M"] * dim * context
        shapes.append(CardShape(name, launches, work, moved, asked, padded))
    return shapes
