"""y = x @ w.T of codes: 4, 5, 6 or 8 bits, one fp16 scale for each group of 16 to 128 along K, x in bf16 or fp16.

Codes, scales and offsets lie as ``codes.py`` says: a step along K is some parts of H values of one group, and words of
16 bits hold the codes of several parts.

Weights are computed in fp32 in registers, where each of these is exact but for one rounding to x's dtype, and are the
tensor core's first operand for any number of rows (on sm_90 wgmma takes that one from registers).

Roofline: a quarter to half of ``linear``'s weight bytes and its rate on the tensor cores; a code of 4 bits costs about
three other instructions before it gets there (half a shift, one that masks and sets bits, a multiply-add, half a
rounding), one or two more of 5 and 6 bits, ten more through a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda import gemm
from ridgeline.backends.cuda.codes import (
    Offset,
    book_of,
    check_codes,
    fields_of,
    half_of,
    packed_shapes,
    parts_of,
    scale_of,
    step_of,
    weights_of,
)
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
from ridgeline.backends.cuda.launch import CardShape, Launch

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(8, 8, 64, 32, num_warps=2, num_stages=4, per_sm=4, swap=True),
        Tile(16, 16, 128, 32, num_warps=4, num_stages=4, per_sm=2, swap=True),
        Tile(64, 64, 128, 16, num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(MANY, 64, 128, 16, num_warps=4, num_stages=3, per_sm=2, swap=True),
    ),
    "sm_90": (
        Tile(16, 16, 128, 32, num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(64, 64, 128, 32, num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 32, num_warps=8, num_stages=2, per_sm=1, swap=True),
    ),
}
"""Configurations by architecture, by rows; block_k: values of a part in one product, half of it where sums, the sums
of earlier parts along K and x leave no registers for more. Of 16 rows at least on sm_90, where fewer get mma.sync."""

OF_CODEBOOKS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (*CONFIGS["sm_80"][:3], Tile(MANY, 128, 128, 16, num_warps=8, num_stages=3, per_sm=1, swap=True)),
    "sm_90": (CONFIGS["sm_90"][0], replace(CONFIGS["sm_90"][1], block_n=64), CONFIGS["sm_90"][2]),
}
"""The same through a codebook, whose decoding takes more registers."""


@triton.jit
def _part(
    codes,
    above,
    scales,
    columns,
    N,
    step,
    part: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
    ROOMY: tl.constexpr,
):
    """fp32 weights of a part of a step, from the words that hold its codes."""
    scale, offset = scale_of(scales, columns, N, step, part, HALF, WIDTH, PARTS, OFFSET)
    # In bits 12 and 16 in turn, two parts share a shift; in 16 alone they take fewer registers. Of 8 bits 12 has room.
    AT: tl.constexpr = 12 if BITS == 8 or OFFSET == "codebook" or (ROOMY and BITS == 4 and part % 2 == 0) else 16
    return weights_of(fields_of(codes, above, part, AT, BITS), scale, offset, AT, BITS, OFFSET, BOOK_LOW, BOOK_HIGH)


@triton.jit
def _beside(left, right, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 2 WIDTH] from two of [ROWS, WIDTH]; a thread has what it had, so nothing moves."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [ROWS, 2 * WIDTH])


@triton.jit
def _pair(
    codes,
    above,
    scales,
    columns,
    N,
    step,
    part: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[BLOCK_N, 2 HALF] of DTYPE: a part and the next."""
    left = _part(
        codes, above, scales, columns, N, step, part,
        HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, True,
    )  # fmt: skip
    right = _part(
        codes, above, scales, columns, N, step, part + 1,
        HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, True,
    )  # fmt: skip
    return _beside(left.to(DTYPE), right.to(DTYPE), BLOCK_N, HALF)


@triton.jit
def _sum(
    x,
    w,
    scales,
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
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: the sum over the steps first .. last - 1 of K, in order, from zero.

    On sm_90 the parts that lie in the same words are one product, whose first operand a thread puts together in its
    registers: one copy of x, one of codes. On sm_80 each is a product of its own: the compiler then gives every warp
    its own columns, where it would have two decode the same ones, and lays x out for wide loads.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    columns = (column + tl.arange(0, BLOCK_N)) % N
    if not TMA:
        x_at = addresses(x, row, M, stride_x, BLOCK_M, BLOCK_K)
        w_at = addresses(w, column, N, stride_w, BLOCK_N, BLOCK_K)
    HELD: tl.constexpr = 2 if BITS == 8 else 4
    ABOVE: tl.constexpr = 1 if BITS == 5 or BITS == 6 else 0
    for step in range(first, last):
        word = step * (ABOVE + PARTS // HELD) * HALF
        above = None
        if ABOVE:
            above = w.load([column, word]) if TMA else tl.load(w_at + word)
        for tile in tl.static_range(PARTS // HELD):
            at = word + (ABOVE + tile) * HALF
            k = (step * PARTS + tile * HELD) * HALF
            if TMA:
                codes = w.load([column, at])
                a = x.load([row, k])
                weights = _pair(
                    codes, above, scales, columns, N, step, tile * HELD,
                    BLOCK_N, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, a.dtype,
                )  # fmt: skip
                if HELD == 4:
                    more = _pair(
                        codes, above, scales, columns, N, step, tile * HELD + 2,
                        BLOCK_N, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, a.dtype,
                    )  # fmt: skip
                    weights = _beside(weights, more, BLOCK_N, 2 * HALF)
                acc = tl.dot(weights, a.T, acc)
            else:
                codes = tl.load(w_at + at)
                if BLOCK_K < HALF:
                    later = tl.load(w_at + at + BLOCK_K)
                for part in tl.static_range(HELD):
                    for half in tl.static_range(HALF // BLOCK_K):
                        a_k = k + part * HALF + half * BLOCK_K
                        if EVEN_K:
                            a = tl.load(x_at + a_k)
                        else:
                            a = tl.load(x_at + a_k, mask=(a_k + tl.arange(0, BLOCK_K) < K)[None, :], other=0.0)
                        weights = _part(
                            later if half else codes, above, scales, columns, N, step, tile * HELD + part,
                            HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, BLOCK_K == HALF,
                        )  # fmt: skip
                        acc = tl.dot(weights.to(a.dtype), a.T, acc)
    return tl.trans(acc)


@triton.jit(do_not_specialize=["M"])
def linear_quantized_kernel(
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
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
    PARALLEL: tl.constexpr,
    SWAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SILU_MUL: tl.constexpr,
    workspace=None,
    counters=None,
    bias=None,
    residual=None,
    stride_residual=0,
):
    """out = epilogue(x @ weights.T), persistent: each program takes every num_programs-th job.

    x [M, K] and w, the codes: descriptors (TMA) or pointers. WIDTH: values of K in a group. BOOK_LOW,
    BOOK_HIGH: a codebook's bytes.
    workspace: [SPLIT, M, N] fp32; counters: one int32 for each tile, zero.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, PARTS * HALF)
    length = tl.cdiv(steps, SPLIT)
    jobs = tiles * SPLIT if PARALLEL else tiles
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        tile = job // SPLIT if PARALLEL else job
        part = job % SPLIT if PARALLEL else 0
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        first = part * length
        last = min(first + length, steps)
        y = _sum(
            x, w, scales, row, column, first, last, M, N, K, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, TMA, EVEN_K,
        )  # fmt: skip
        done = True
        if PARALLEL:
            put_part(y, workspace, part, row, column, M, N, BLOCK_M, BLOCK_N)
            done = arrive(counters, tile, SPLIT)
        else:
            for later in range(1, SPLIT):
                last = min((later + 1) * length, steps)
                y += _sum(
                    x, w, scales, row, column, later * length, last, M, N, K, stride_x, stride_w,
                    BLOCK_M, BLOCK_N, BLOCK_K, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, TMA, EVEN_K,
                )  # fmt: skip
        if done:
            if PARALLEL:
                y = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def split_of(n: int, k: int, group: int, bits: int = 4) -> int:
    """Parts along K of a product with an [n, k] weight."""
    return gemm.split_k(n, k, step_of(group, bits), least=512)


def linear_quantized_scratch(m: int, n: int, k: int, group: int, bits: int = 4) -> Scratch:
    """Scratch that ``linear_quantized`` needs for [m, k] by [n, k]."""
    return gemm.scratch(m, n, split_of(n, k, group, bits))


def linear_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    arch: str,
    *,
    group: int,
    bits: int = 4,
    offset: Offset = "middle",
    codebook: Sequence[int] | None = None,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ weights.T).

    Args:
        x: [M, K] bf16 or fp16, rows contiguous.
        codes, scales: as ``codes.py`` says, scales with what ``offset`` adds. Rows of a weight for silu_mul are in the
            merged order.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        group: values of K that share a scale; bits: of a code.
        codebook: 16 integers from -128 to 127, where ``offset`` is "codebook".
        after: what follows the sum.
        workspace, counters: as ``linear_quantized_scratch`` says.
        batch_invariant: False lets many rows go without the split over K.
    """
    (m, k), n = x.shape, codes.shape[0]
    after = after or Epilogue()
    check_codes(codes, scales, k, group, bits, offset, codebook)
    gemm.check_shapes(m, n, out, after)
    if any(t.stride(1) != 1 for t in (x, codes, out)):
        raise ValueError("rows must be contiguous")
    words = codes.view(torch.int16)
    regular = gemm.regular(x, words, k, arch)
    tile, tma = _tile(arch, m, group, bits, offset, regular, out), regular and arch == "sm_90"
    split = split_of(n, k, group, bits) if batch_invariant or m <= gemm.MOST_SPLIT_ROWS else 1
    args = gemm.operands(x, words, tile, tma, parts=2 if bits == 8 else 4)
    args |= {"scales": scales, **after.args()}
    meta: dict[str, Any] = {"HALF": half_of(group, bits), "WIDTH": group, "BITS": bits, "PARTS": parts_of(bits)}
    meta |= {**book_of(codebook), "OFFSET": offset, "TMA": tma, "EVEN_K": k % step_of(group, bits) == 0}
    product = Product(linear_quantized_kernel, arch, m, n, k, tile, split)
    return [product.launch(args, out, workspace, counters, SILU_MUL=after.silu_mul, **meta)]


def _tile(arch: str, m: int, group: int, bits: int, offset: Offset, regular: bool, out: torch.Tensor) -> Tile:
    table = (OF_CODEBOOKS if offset == "codebook" else CONFIGS)[arch]
    tile = gemm.pick(table, m, regular, out)
    tile = replace(tile, block_k=min(tile.block_k, half_of(group, bits)))
    if bits == 5 and regular and tile.rows < MANY:  # a step, and so a stage, is twice as long
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile if regular else replace(tile, num_warps=4)


@dataclass(frozen=True)
class _Format:
    """A format whose card is kept: of whole layers, or of the qkv projection alone.

    Attributes:
        bytes: of one weight, scales and zeros included.
    """

    name: str
    bits: int
    group: int
    offset: Offset
    bytes: float
    whole: bool = False


FORMATS = (
    _Format("4 bits", 4, 128, "zero", 0.5 + 4 / 128, whole=True),  # AWQ
    _Format("8 bits", 8, 32, "middle", 1 + 2 / 32, whole=True),  # Q8_0
    _Format("5 bits", 5, 32, "minimum", 0.625 + 4 / 32),  # Q5_1
    _Format("6 bits", 6, 16, "middle", 0.75 + 2 / 16),
    _Format("codebook", 4, 32, "codebook", 0.5 + 2 / 32),  # IQ4_NL
)


def card_shapes(arch: str) -> list[CardShape]:
    """The projections of an 8B Llama layer."""
    shapes = []
    for form in FORMATS:
        found = gemm.llama_shapes(partial(_card_launches, form), arch, weight_bytes=form.bytes, input_bytes=2.0)
        kept = [shape for shape in found if form.whole or shape.name.startswith("qkv")]
        shapes += [replace(shape, name=f"{form.name} {shape.name}") for shape in kept]
    return shapes


def _card_launches(
    form: _Format, m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str
) -> list[Launch]:
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    shapes = packed_shapes(n, k, form.group, form.bits, form.offset)
    codes = torch.empty(shapes[0], dtype=torch.uint8, device="meta")
    scales = torch.empty(shapes[1], dtype=torch.int32, device="meta")
    workspace, counters = linear_quantized_scratch(m, n, k, form.group, form.bits).tensors("meta")
    how: dict[str, Any] = {"group": form.group, "bits": form.bits, "offset": form.offset, "after": after}
    if form.offset == "codebook":
        how["codebook"] = range(-128, 128, 16)
    return linear_quantized(x, codes, scales, out, arch, workspace=workspace, counters=counters, **how)
