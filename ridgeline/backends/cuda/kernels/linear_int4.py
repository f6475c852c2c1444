"""y = x @ w.T of 4-bit codes: W4A16, one fp16 scale for each group of 32, 64 or 128 along K, x in bf16 or fp16.

**Layout.** With H = min(group, 64) and K counted in steps of 2 H:
- codes: uint8 [N, H * steps]; byte j of step s holds code ``2 H s + j`` in its low half and ``2 H s + H + j`` in its
  high half, so that either half of a row's bytes is H codes of one group that lie side by side, as in x. Codes past K
  are zero.
- scales: fp16 [groups, N], groups = 2 H * steps / group; columns lie side by side, as a tile reads them. Zero past K.
- what is added to a code or to its product, by ``Offset``, fp16 [groups, N] too:
  "eight": (code - 8) * scale (Q4_0); "minimum": code * scale + minimum (Q4_1);
  "zero": (code - zero) * scale (AWQ and GPTQ, whose zeros are integers).
``pack`` makes it from plain codes.

Weights are computed in fp32 in registers, where each of these is exact but for one rounding to x's dtype, and are the
tensor core's first operand for any number of rows (on sm_90 wgmma takes that one from registers).

Roofline: a quarter of ``linear``'s weight bytes and its rate on the tensor cores; a code costs about four other
instructions before it gets there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda import gemm
from ridgeline.backends.cuda.gemm import (
    MANY,
    Epilogue,
    Product,
    Scratch,
    Tile,
    addresses,
    arrive,
    epilogue,
    put_part,
    sum_parts,
    tile_origin,
)
from ridgeline.backends.cuda.launch import CardShape, Launch, cdiv

Offset = Literal["eight", "minimum", "zero"]

GROUPS = (32, 64, 128)

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, 64, num_warps=8, num_stages=5, per_sm=2, swap=True),
        Tile(64, 64, 64, 64, num_warps=4, num_stages=4, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=3, per_sm=1, swap=True),
    ),
    "sm_90": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=6, per_sm=3, swap=True),
        Tile(64, 64, 64, 64, num_warps=4, num_stages=5, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=4, per_sm=1, swap=True),
    ),
}
"""Configurations by architecture, by rows; block_k is H, half a step of K."""


@triton.jit
def _weights(codes, scale, offset, OFFSET: tl.constexpr):
    """fp32 weights from [BLOCK_N, H] codes, int32, and [BLOCK_N] scales and offsets."""
    # A code in the last bits of 2^23 is 2^23 + code: one bitwise or, and no conversion, which runs at a quarter rate.
    value = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    scale = scale.to(tl.float32)[:, None]
    if OFFSET == "eight":
        return (value - 8388616.0) * scale
    elif OFFSET == "zero":
        return (value - (8388608.0 + offset.to(tl.float32)[:, None])) * scale
    else:
        return (value - 8388608.0) * scale + offset.to(tl.float32)[:, None]


@triton.jit
def _sum(
    x,
    w,
    scales,
    offsets,
    row,
    column,
    first,
    last,
    M,
    N,
    K,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: the sum over the steps first .. last - 1 of K, in order, from zero."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    columns = (column + tl.arange(0, BLOCK_N)) % N
    if not TMA:
        x_at = addresses(x, row, M, stride_x, BLOCK_M, HALF)
        w_at = addresses(w, column, N, stride_w, BLOCK_N, HALF)
    for step in range(first, last):
        if TMA:
            codes = w.load([column, step * HALF])
        else:
            codes = tl.load(w_at + step * HALF)
        for half in tl.static_range(2):
            k = (2 * step + half) * HALF
            if TMA:
                a = x.load([row, k])
            elif EVEN_K:
                a = tl.load(x_at + k)
            else:
                a = tl.load(x_at + k, mask=(k + tl.arange(0, HALF) < K)[None, :], other=0.0)
            group = (k // WIDTH).to(tl.int64) * N
            scale = tl.load(scales + group + columns)
            offset = scale
            if OFFSET != "eight":
                offset = tl.load(offsets + group + columns)
            these = (codes >> 4 if half else codes & 15).to(tl.int32)
            acc = tl.dot(_weights(these, scale, offset, OFFSET).to(a.dtype), a.T, acc)
    return tl.trans(acc)


@triton.jit(do_not_specialize=["M"])
def linear_int4_kernel(
    x,
    w,
    out,
    scales,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    PARALLEL: tl.constexpr,
    SWAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SILU_MUL: tl.constexpr,
    offsets=None,
    workspace=None,
    counters=None,
    bias=None,
    residual=None,
    stride_residual=0,
):
    """out = epilogue(x @ weights.T), persistent: each program takes every num_programs-th job.

    x [M, K] and w, the codes: descriptors (TMA) or pointers. WIDTH: values of K in a group.
    workspace: [SPLIT, M, N] fp32; counters: one int32 for each tile, zero.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, 2 * BLOCK_K)
    length = tl.cdiv(steps, SPLIT)
    jobs = tiles * SPLIT if PARALLEL else tiles
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        tile = job // SPLIT if PARALLEL else job
        part = job % SPLIT if PARALLEL else 0
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        first = part * length
        last = min(first + length, steps)
        y = _sum(
            x, w, scales, offsets, row, column, first, last, M, N, K, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, OFFSET, TMA, EVEN_K,
        )  # fmt: skip
        done = True
        if PARALLEL:
            put_part(y, workspace, part, row, column, M, N, BLOCK_M, BLOCK_N)
            done = arrive(counters, tile, SPLIT)
        else:
            for later in range(1, SPLIT):
                last = min((later + 1) * length, steps)
                y += _sum(
                    x, w, scales, offsets, row, column, later * length, last, M, N, K, stride_x, stride_w,
                    BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, OFFSET, TMA, EVEN_K,
                )  # fmt: skip
        if done:
            if PARALLEL:
                y = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def half_of(group: int) -> int:
    """H: codes of one group that lie side by side."""
    return min(group, 64)


def packed_shapes(n: int, k: int, group: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes' bytes and of the scales of an [n, k] weight."""
    half = half_of(group)
    steps = cdiv(k, 2 * half)
    return (n, half * steps), (2 * half * steps // group, n)


def pack(codes: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (or offsets) in this file's layout.

    Args:
        codes: [N, K] uint8 in 0..15; scales: [N, K / group].
    """
    (n, k), half = codes.shape, half_of(group)
    (_, width), (groups, _) = packed_shapes(n, k, group)
    padded = torch.nn.functional.pad(codes, (0, 2 * width - k)).reshape(n, -1, 2, half)
    packed = (padded[:, :, 0] | padded[:, :, 1] << 4).reshape(n, width)
    return packed, torch.nn.functional.pad(scales, (0, groups - scales.shape[1])).T.contiguous()


def split_of(n: int, k: int, group: int) -> int:
    """Parts along K of a product with an [n, k] weight."""
    return gemm.split_k(n, k, 2 * half_of(group), least=512)


def linear_int4_scratch(m: int, n: int, k: int, group: int) -> Scratch:
    """Scratch that ``linear_int4`` needs for [m, k] by [n, k]."""
    return gemm.scratch(m, n, split_of(n, k, group))


def linear_int4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    arch: str,
    *,
    group: int,
    offset: Offset = "eight",
    offsets: torch.Tensor | None = None,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ weights.T).

    Args:
        x: [M, K] bf16 or fp16, rows contiguous.
        codes, scales, offsets: as the module says; offsets unless ``offset`` is "eight". Rows of a weight for
            silu_mul are in the merged order.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        after: what follows the sum.
        workspace, counters: as ``linear_int4_scratch`` says.
        batch_invariant: False lets many rows go without the split over K.
    """
    (m, k), n = x.shape, codes.shape[0]
    after = after or Epilogue()
    _check(x, codes, scales, offsets, out, group, offset, after)
    half = half_of(group)
    regular = gemm.regular(x, codes, k, arch)
    tile, tma = replace(gemm.pick(CONFIGS[arch], m, regular), block_k=half), regular and arch == "sm_90"
    split = split_of(n, k, group) if batch_invariant or m <= gemm.MOST_SPLIT_ROWS else 1
    args = gemm.operands(x, codes, tile, tma)
    args |= {"scales": scales, **({"offsets": offsets} if offsets is not None else {}), **after.args()}
    meta: dict[str, Any] = {"WIDTH": group, "OFFSET": offset, "TMA": tma, "EVEN_K": k % (2 * half) == 0}
    product = Product(linear_int4_kernel, arch, m, n, k, tile, split)
    return [product.launch(args, out, workspace, counters, SILU_MUL=after.silu_mul, **meta)]


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    out: torch.Tensor,
    group: int,
    offset: Offset,
    after: Epilogue,
) -> None:
    """Raises ValueError for operands that do not make a product."""
    (m, k), n = x.shape, codes.shape[0]
    if group not in GROUPS:
        raise ValueError(f"groups of {group}: this kernel has {GROUPS}")
    if (offsets is None) != (offset == "eight"):
        raise ValueError(f"offset {offset!r} with{'out' if offsets is None else ''} offsets")
    codes_shape, scales_shape = packed_shapes(n, k, group)
    for name, tensor, shape in (("codes", codes, codes_shape), ("scales", scales, scales_shape)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} are {tuple(tensor.shape)}, wanted {shape}")
    for found in (scales, offsets):
        if found is not None and (not found.is_contiguous() or tuple(found.shape) != scales_shape):
            raise ValueError(f"scales and offsets are contiguous and {scales_shape}")
    gemm.check_shapes(m, n, out, after)
    if any(t.stride(1) != 1 for t in (x, codes, out)):
        raise ValueError("rows must be contiguous")


def card_shapes(arch: str) -> list[CardShape]:
    """The projections of an 8B Llama layer, zeros per group of 128 (AWQ)."""
    return gemm.llama_shapes(_card_launches, arch, weight_bytes=0.5 + 4 / 128, input_bytes=2.0)


def _card_launches(m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str) -> list[Launch]:
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    shapes = packed_shapes(n, k, 128)
    codes = torch.empty(shapes[0], dtype=torch.uint8, device="meta")
    scales, zeros = (torch.empty(shapes[1], dtype=torch.float16, device="meta") for _ in range(2))
    workspace, counters = linear_int4_scratch(m, n, k, 128).tensors("meta")
    scratch: dict[str, Any] = {"workspace": workspace, "counters": counters}
    return linear_int4(x, codes, scales, out, arch, group=128, offset="zero", offsets=zeros, after=after, **scratch)
