"""Attention of many query tokens over a paged cache: FlashAttention 2 (Dao, 2023) in chunks of absolute positions.

A request's rows are its query tokens times the query heads of one KV head: row r is token r // group, head r % group.
A program takes BLOCK_M rows and walks over the keys they see, BLOCK_N at a time.

Bits. Keys are taken in chunks of 256 absolute positions. Each chunk starts anew and yields a partial (m, l, o): the
largest score, the sum of the probabilities, the weighted values; ``merge`` folds partials in chunk order. The decode
kernel computes partials with the same function, ``attend``, over tiles of the same keys, and folds them with the same
``merge``; so a row's bits do not depend on which kernel computes it, nor on how its prefill is cut. This needs:
- What a row does not see changes nothing: masked scores are -inf, their probabilities 0, a factor of a tile or a chunk
  without visible keys is exactly 1. A program may therefore skip such tiles or not.
- Tensor cores sum over head dimensions and over keys in one order whatever the rows of a tile, and whichever operand
  comes first. On Hopper both kernels use wgmma.
- l is a matrix product too, with ones: no sum depends on how a tile lies in threads. It adds up what weighs the values,
  and it costs less than the sum of the rounded probabilities would.
- Every a * b + c is an explicit fma: nothing is left to the compiler's choice.

Caches of 8 bits become the queries' type in registers, without rounding, by integer operations on both architectures.
- int8 with a scale for each token and head: a key's scores are multiplied by its scale in fp32, before the soft-cap; a
  value's scale multiplies the key's probability in fp32, and the product is rounded once to weigh the codes. l adds up
  the rounded probabilities without it.
- fp8 e4m3 with one scale a tensor: that of keys is part of the factor on scores, that of values multiplies 1 / l. The
  codes for NaN read as 480, as rope_kv, which saturates, writes them for NaN alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.launch import CardShape, Config, Launch

CHUNK = 256
"""Keys of a partial; a multiple of every page size."""

PLAIN, INT8, FP8 = 0, 1, 2
"""What the cache holds: the queries' type, or 8 bits."""


@dataclass(frozen=True)
class Shape:
    """How a head size is computed.

    Attributes:
        keys: BLOCK_N, of both kernels, over a cache of the queries' type, and over one of 8 bits.
        prefill, decode: (BLOCK_M, parts that the value columns are split into over programs, warps, stages).
    """

    keys: tuple[int, int]
    prefill: tuple[int, int, int, int]
    decode: tuple[int, int, int, int]


SHAPES: dict[str, dict[int, Shape]] = {
    "sm_80": {
        64: Shape((64, 64), (128, 1, 8, 3), (16, 1, 4, 3)),
        128: Shape((64, 64), (128, 1, 8, 3), (16, 1, 4, 3)),
        256: Shape((32, 32), (128, 2, 8, 3), (16, 1, 4, 3)),
    },
    "sm_90": {
        64: Shape((64, 64), (128, 1, 8, 3), (64, 1, 4, 3)),
        128: Shape((64, 32), (128, 1, 8, 3), (64, 1, 4, 3)),  # 64 keys spill over int8
        192: Shape((64, 64), (128, 2, 8, 3), (64, 1, 8, 2)),  # a third stage spills beside a soft-cap
        256: Shape((64, 32), (128, 2, 8, 3), (64, 1, 8, 3)),
    },
}
"""Architecture -> largest head size -> how. Two accumulators, of the chunk and of all before it, must fit the registers
in prefill: 128 columns of 64 rows take half of a warp group's. Wider values are split over programs."""


@triton.jit
def find_tile(index, query_starts, requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request of tile ``index``, and its tile.

    Tiles of request b begin at floor(rows before b / BLOCK_M) + b, which leaves room for the ragged end of each.
    """
    before = 0
    for base in range(0, requests, 256):
        b = base + tl.arange(0, 256)
        starts = tl.load(query_starts + b, mask=b < requests, other=0)
        before += tl.sum(((b < requests) & (starts * GROUP // BLOCK_M + b <= index)).to(tl.int32), axis=0)
    request = before - 1
    return request, index - (tl.load(query_starts + request) * GROUP // BLOCK_M + request)


@triton.jit
def operand(codes, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values as the tensor cores take them: each code's number in DTYPE, exactly."""
    if KIND == 1:  # the low 7 bits less the sign's 128, as the fractions of two numbers in one binade
        BASE: tl.constexpr = 0x6400 if DTYPE == tl.float16 else 0x4300
        bits = codes.to(tl.uint16)
        low, sign = (bits & 0x7F) | BASE, (bits & 0x80) | BASE
        return low.to(DTYPE, bitcast=True) - sign.to(DTYPE, bitcast=True)
    elif KIND == 2:  # exponents of 4 bits in a place for more: too small by a power of two
        SHIFT: tl.constexpr = 7 if DTYPE == tl.float16 else 4
        FACTOR: tl.constexpr = 256.0 if DTYPE == tl.float16 else 1329227995784915872903807060280344576.0  # 2^8, 2^120
        bits = codes.to(tl.uint16)
        number = ((bits & 0x80) << 8) | ((bits & 0x7F) << SHIFT)
        return number.to(DTYPE, bitcast=True) * FACTOR
    else:
        return codes


@triton.jit
def attend(
    q1, q2, k_head, v_head, k_scales, v_scales, table, start, low, high, positions, m, l, o1, o2,
    block_stride, token_stride, scale_stride, scale, cap_scale, window,
    D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Takes keys [start, start + BLOCK_N) into a partial.

    q1 [M, D1], q2 [M, D2]: the two parts of a head; positions [M]; [low, high): what any row sees; k_scales,
    v_scales: of the head, a block's scale_stride apart; m, l [M] and o1 [M, V1], o2 [M, V2]: the partial. Scores are
    in base 2: scale holds log2(e).
    """
    keys = start + tl.arange(0, BLOCK_N)
    seen = (keys >= low) & (keys < high)
    blocks = tl.load(table + keys // PAGE, mask=seen, other=0).to(tl.int64)
    at = (blocks * block_stride + (keys % PAGE) * token_stride)[:, None]
    live = seen[:, None]
    k = tl.load(k_head + at + tl.arange(0, D1)[None, :], mask=live, other=0)
    s = tl.dot(q1, tl.trans(operand(k, KIND, q1.dtype)))
    if D2 > 0:
        k = tl.load(k_head + at + (D1 + tl.arange(0, D2)[None, :]), mask=live, other=0)
        s = tl.dot(q2, tl.trans(operand(k, KIND, q1.dtype)), s)
    if KIND == 1:
        scale_at = blocks * scale_stride + keys % PAGE
        s = s * tl.load(k_scales + scale_at, mask=seen, other=0.0)[None, :]
    if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1); scale is then the cap's
        s = tl.fma(1.0 / (tl.exp2(s * cap_scale) + 1.0), -2.0, 1.0)
    column, last = tl.arange(0, BLOCK_N)[None, :], (positions - start)[:, None]
    visible = column <= last
    if HAS_WINDOW:
        visible = visible & (column > last - window)
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(s, tl.full(s.shape, scale, tl.float32), tl.broadcast_to(-reference[:, None], s.shape)))
    weights = p.to(q1.dtype)
    alpha = tl.exp2(m - reference)
    l = tl.dot(weights, tl.full([BLOCK_N, 8], 1.0, q1.dtype), l * alpha[:, None])
    if KIND == 1:
        weights = (p * tl.load(v_scales + scale_at, mask=seen, other=0.0)[None, :]).to(q1.dtype)
    # Rows that no one sees are 0 here: whatever a page holds there would turn a probability of 0 into NaN.
    v = tl.load(v_head + at + tl.arange(0, V1)[None, :], mask=live, other=0)
    o1 = tl.dot(weights, operand(v, KIND, q1.dtype), o1 * alpha[:, None])
    if V2 > 0:
        v = tl.load(v_head + at + (V1 + tl.arange(0, V2)[None, :]), mask=live, other=0)
        o2 = tl.dot(weights, operand(v, KIND, q1.dtype), o2 * alpha[:, None])
    return m_new, l, o1, o2


@triton.jit
def weights_of(m_all, m):
    """The largest score of both, and what what came before and the next partial count for."""
    largest = tl.maximum(m_all, m)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.exp2(m_all - reference), tl.exp2(m - reference)


@triton.jit
def add(total, before, x, now):
    """total * before + x * now."""
    return tl.fma(x, now, total * before)


@triton.jit
def merge(m_all, l_all, o1_all, o2_all, m, l, o1, o2, V2: tl.constexpr):
    """Folds the next chunk's partial into what came before it."""
    largest, before, now = weights_of(m_all, m)
    o1_all = add(o1_all, before[:, None], o1, tl.broadcast_to(now[:, None], o1.shape))
    if V2 > 0:
        o2_all = add(o2_all, before[:, None], o2, tl.broadcast_to(now[:, None], o2.shape))
    l_all = add(l_all, before[:, None], l, tl.broadcast_to(now[:, None], l.shape))
    return largest, l_all, o1_all, o2_all


@triton.jit(do_not_specialize=["requests", "longer_than", "table_stride", "window"])
def prefill_kernel(
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
    requests,
    longer_than,
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
    V1: tl.constexpr,
    V2: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Program (tile, KV head, part of the value columns); the last tiles, which see the most keys, come first."""
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    request, tile = find_tile(index, query_starts, requests, GROUP, BLOCK_M)
    kv_head, column = tl.program_id(1), tl.program_id(2) * (V1 + V2)
    first = tl.load(query_starts + request)
    tokens = tl.load(query_starts + request + 1) - first
    if (tile * BLOCK_M >= tokens * GROUP) | (tokens <= longer_than):
        return
    cached = tl.load(context_lens + request) - tokens
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // GROUP
    live = (rows < tokens * GROUP)[:, None]
    high = cached + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1) + 1
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(cached + tile * BLOCK_M // GROUP - window + 1, 0)
    head = kv_head * GROUP + rows % GROUP
    from_q = q + ((first + token).to(tl.int64) * q_stride + head * q_head_stride)[:, None]
    q1 = tl.load(from_q + tl.arange(0, D1)[None, :], mask=live, other=0.0)
    q2 = q1
    if D2 > 0:
        q2 = tl.load(from_q + (D1 + tl.arange(0, D2)[None, :]), mask=live, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M, 8], tl.float32)
    o1 = tl.zeros([BLOCK_M, V1], tl.float32)
    o2 = tl.zeros([BLOCK_M, V2 if V2 > 0 else 16], tl.float32)
    m_all, l_all, o1_all, o2_all = m, l, o1, o2
    k_head = k_cache + kv_head.to(tl.int64) * head_stride
    v_head = v_cache + kv_head.to(tl.int64) * head_stride + column
    k_scales, v_scales = k_scales + kv_head * scale_head_stride, v_scales + kv_head * scale_head_stride
    table = block_tables + tl.load(slots + request).to(tl.int64) * table_stride
    for step in range(low // BLOCK_N, tl.cdiv(high, BLOCK_N)):
        m, l, o1, o2 = attend(
            q1, q2, k_head, v_head, k_scales, v_scales, table, step * BLOCK_N, low, high, cached + token, m, l, o1, o2,
            block_stride, token_stride, scale_stride, scale, cap_scale, window,
            D1, D2, V1, V2, PAGE, BLOCK_N, KIND, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
        if (step + 1) % (CHUNK // BLOCK_N) == 0:
            m_all, l_all, o1_all, o2_all = merge(m_all, l_all, o1_all, o2_all, m, l, o1, o2, V2)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the next tile counts the rest of the partial 0 times
    m_all, l_all, o1_all, o2_all = merge(m_all, l_all, o1_all, o2_all, m, l, o1, o2, V2)
    factor = (v_scale / tl.max(l_all, axis=1))[:, None]
    # Read again and computed again, so that the rows' addresses take no registers during the loop.
    first = tl.load(query_starts + request, volatile=True)
    rows = (index - (first * GROUP // BLOCK_M + request)) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (rows < tokens * GROUP)[:, None]
    to = out + (first + rows // GROUP).to(tl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * out_head_stride
    to = (to + column)[:, None]
    tl.store(to + tl.arange(0, V1)[None, :], (o1_all * factor).to(out.dtype.element_ty), mask=live)
    if V2 > 0:
        tl.store(to + (V1 + tl.arange(0, V2)[None, :]), (o2_all * factor).to(out.dtype.element_ty), mask=live)


def parts(size: int) -> tuple[int, int]:
    """A size as a power of two and a smaller one or 0: nothing is padded."""
    large = 1 << (size.bit_length() - 1)
    return large, size - large


HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
"""Up to 256: powers of two from 16 and sums of two of them, whose halves are such too where values are split."""


def shape_of(head_dim: int, arch: str) -> Shape:
    """How a head size is computed.

    Raises:
        ValueError: it is none of HEAD_SIZES: a model would have to pad its heads with zeros.
    """
    if head_dim not in HEAD_SIZES:
        raise ValueError(f"attention: a head size of {head_dim}; supported are {', '.join(map(str, HEAD_SIZES))}")
    return next(shape for largest, shape in SHAPES[arch].items() if head_dim <= largest)


Pair = tuple[torch.Tensor, torch.Tensor]


def kind_of(q: torch.Tensor, caches: Pair, scales: Pair | None, tensor_scales: tuple[float, float]) -> int:
    """What the cache holds; raises ValueError for types and scales that do not go together."""
    kind = {torch.int8: INT8, torch.float8_e4m3fn: FP8, q.dtype: PLAIN}.get(caches[0].dtype)
    if kind is None or caches[0].dtype != caches[1].dtype or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: queries of {q.dtype} over a cache of {caches[0].dtype} and {caches[1].dtype}")
    if (kind == INT8) != (scales is not None) or (kind != FP8 and tensor_scales != (1.0, 1.0)):
        raise ValueError("attention: scales go with an int8 cache, and tensor_scales with an fp8 cache")
    if scales and (scales[0].stride() != scales[1].stride() or scales[0].stride(2) != 1):
        raise ValueError("attention: scales of keys and values of equal strides, a page's contiguous")
    return kind


def common_args(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    tensor_scales: tuple[float, float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run-time arguments and constants that both attention kernels take; ``tables`` as in ``attention_prefill``.

    Raises:
        ValueError: what the kernels cannot do.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    if k_cache.stride() != v_cache.stride() or 1 != q.stride(2) or 1 != out.stride(2) or 1 != k_cache.stride(3):
        raise ValueError("attention: keys and values of equal strides, heads contiguous")
    kind = kind_of(q, (k_cache, v_cache), scales, tensor_scales)
    if kind != PLAIN:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_scales, v_scales = scales or (q, q)
    scale = scale * tensor_scales[0]
    if CHUNK % page or page < 8 or heads % kv_heads or scale <= 0:
        raise ValueError(f"attention: pages of {page} tokens, {heads} heads over {kv_heads}, scale {scale}")
    block_tables, slots, query_starts, context_lens = tables
    log2e = math.log2(math.e)
    args = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_scales": k_scales,
        "v_scales": v_scales,
        "block_tables": block_tables,
        "slots": slots,
        "query_starts": query_starts,
        "context_lens": context_lens,
        "out": out,
        "requests": slots.shape[0],
        "q_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "out_stride": out.stride(0),
        "out_head_stride": out.stride(1),
        "table_stride": block_tables.stride(0),
        "block_stride": k_cache.stride(0),
        "head_stride": k_cache.stride(1),
        "token_stride": k_cache.stride(2),
        "scale_stride": k_scales.stride(0) if scales else 0,
        "scale_head_stride": k_scales.stride(1) if scales else 0,
        "scale": (soft_cap or scale) * log2e,
        "cap_scale": 2.0 * scale / soft_cap * log2e if soft_cap else 0.0,
        "v_scale": tensor_scales[1],
        "window": window or 0,
    }
    d1, d2 = parts(head_dim)
    flags = {"KIND": kind, "HAS_WINDOW": window is not None, "HAS_CAP": soft_cap is not None}
    return args, {"GROUP": heads // kv_heads, "D1": d1, "D2": d2, "PAGE": page, "CHUNK": CHUNK, **flags}


def tiles(tokens: int, requests: int, group: int, rows: int) -> int:
    """What ``find_tile`` numbers: at least the tiles of ``tokens`` tokens of ``requests`` requests."""
    return tokens * group // rows + requests


def attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tensor_scales: tuple[float, float] = (1.0, 1.0),
    longer_than: int = 0,
    arch: str = "sm_90",
) -> list[Launch]:
    """Causal attention of each request's last tokens over its context.

    Args:
        q: [T, heads, head_dim] bf16 or fp16; heads contiguous.
        k_cache, v_cache: [blocks, kv_heads, page, head_dim] of q's type, int8 or float8_e4m3fn, of equal strides, the
            tokens of this step already in them; page a power of two, 8 to 256.
        block_tables: int32 [slots, blocks of a request].
        slots, context_lens: int32 [B]; the context includes the step's own tokens.
        query_starts: int32 [B + 1]: request b owns tokens query_starts[b] to query_starts[b + 1].
        out: [T, heads, head_dim].
        scale: of the scores; positive.
        window: keys in (position - window, position] are seen; None: all up to the position.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        scales, tensor_scales: of a cache of 8 bits, as ``rope_kv`` takes them.
        longer_than: requests of at most so many tokens in this step are left to the decode kernel.

    Raises:
        ValueError: a head size, a page or strides that the kernel cannot do.
    """
    shape = shape_of(q.shape[2], arch)
    tables = (block_tables, slots, query_starts, context_lens)
    args, meta = common_args(q, k_cache, v_cache, tables, out, scale, window, soft_cap, scales, tensor_scales)
    rows, splits, warps, stages = shape.prefill
    v1, v2 = parts(q.shape[2] // splits)
    meta |= {"V1": v1, "V2": v2, "BLOCK_M": rows, "BLOCK_N": shape.keys[meta["KIND"] != PLAIN]}
    args["longer_than"] = longer_than
    grid = (tiles(q.shape[0], slots.shape[0], meta["GROUP"], rows), k_cache.shape[1], splits)
    written = ("out",) if longer_than == 0 else ()
    updated = () if longer_than == 0 else ("out",)
    return [Launch(prefill_kernel, grid, args, Config(meta, warps, stages), written, updated)]


def seen_by(launch: Launch, cached: int, new: int) -> list[tuple[int, int, int]]:
    """Of each tile of a request's rows: how many there are, and [low, high) of what they see, as in the kernels."""
    meta, tiles_of = launch.config.meta, []
    rows, group = meta["BLOCK_M"], meta["GROUP"]
    for start in range(0, new * group, rows):
        high = cached + min((start + rows - 1) // group, new - 1) + 1
        low = max(cached + start // group - launch.args["window"] + 1, 0) if meta["HAS_WINDOW"] else 0
        tiles_of.append((min(rows, new * group - start), low, high))
    return tiles_of


def key_bytes(launch: Launch, columns: int) -> int:
    """What a program loads for a key: its block, the key, ``columns`` of the value, the scales of int8."""
    meta, item = launch.config.meta, launch.args["k_cache"].element_size()
    asked: int = 4 + item * (meta["D1"] + meta["D2"] + columns) + 8 * (meta["KIND"] == INT8)
    return asked


def traffic(launch: Launch, requests: Sequence[tuple[int, int]]) -> int:
    """Bytes that the programs' loads and stores ask for; ``requests``: (cached, new) tokens of each."""
    meta, item = launch.config.meta, launch.args["q"].element_size()
    columns = meta["V1"] + meta["V2"]
    total = math.prod(launch.grid) * (4 * len(requests) + 12)  # every program finds its tile
    for cached, new in (r for r in requests if r[1] > launch.args["longer_than"]):
        for rows, low, high in seen_by(launch, cached, new):
            once = 12 + rows * item * (meta["D1"] + meta["D2"] + columns)
            total += launch.grid[1] * launch.grid[2] * (once + (high - low) * key_bytes(launch, columns))
    return total


CACHES = {"": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Types of caches on the cards."""


def meta_tensors(requests: int, tokens: int, context: int, head_dim: int = 128, cache: str = "") -> dict[str, Any]:
    """Arguments of an 8B Llama's layer (32 heads, 8 KV heads) in bf16, on the meta device; ``cache``: of CACHES."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    kind, blocks, scales = torch.bfloat16, context // 16, {}
    if cache == "int8":
        scales["scales"] = tuple(empty(requests * blocks, 8, 16, dtype=torch.float32) for _ in range(2))
    return scales | {
        "q": empty(requests * tokens, 32, head_dim, dtype=kind),
        "k_cache": empty(requests * blocks, 8, 16, head_dim, dtype=CACHES[cache]),
        "v_cache": empty(requests * blocks, 8, 16, head_dim, dtype=CACHES[cache]),
        "block_tables": empty(256, blocks),
        "slots": empty(requests),
        "query_starts": empty(requests + 1),
        "context_lens": empty(requests),
        "out": empty(requests * tokens, 32, head_dim, dtype=kind),
    }


def cache_bytes(head_dim: int, cache: str) -> int:
    """Bytes of a token's keys and values, and scales, on the cards."""
    return 2 * 8 * (head_dim * CACHES[cache].itemsize + 4 * (cache == "int8"))


def card_shapes(arch: str) -> list[CardShape]:
    """A prompt of 4,096 tokens in an 8B Llama, and the same with other head sizes and caches."""
    shapes, tokens = [], 4096
    for dim, cache in ((128, ""), (64, ""), (256, ""), (128, "int8"), (128, "fp8")):
        launches = attention_prefill(**meta_tensors(1, tokens, tokens, dim, cache), scale=dim**-0.5, arch=arch)
        moved = tokens * (2 * 2 * 32 * dim + cache_bytes(dim, cache))
        work, name = 4.0 * 32 * dim * tokens * (tokens + 1) / 2, f"T={tokens} D={dim} {cache}".strip()
        shapes.append(CardShape(name, launches, work, moved, traffic(launches[0], [(0, tokens)])))
    return shapes
