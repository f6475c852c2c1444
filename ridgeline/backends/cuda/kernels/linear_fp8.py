"""y = x @ w.T of FP8 (e4m3), with scales per tensor, per row, or per block of 128.

- "tensor": one fp32 scale each for x and w. "row": one for each row of x and each row of w. The sum over K is scaled
  once, ``sum * x_scale * w_scale``.
- "block": w has a scale for each 128 x 128 block, x for each row's 128 values; each 128 of K are scaled as they are
  added, ``sum += p * (x_scale * w_scale)``.

sm_90 multiplies FP8 on its tensor cores (QGMMA), whose accumulator keeps 14 bits of the largest addend (DeepSeek-V3's
report, 2024, section 3.3.2). So no sum stays there for more than PART values of K, a block's for 128: parts are added
up in fp32 registers, group by group where K is split, and groups to each other. By a simulation of such an accumulator
(tests/gpu/test_fp8_sums.py), at K = 4,096 of normal numbers, parts of 1,024 err by 0.05% of the result's rms, all of K
in one by 0.13%; rounding the result to bf16 costs 0.17%, the operands to e4m3 3.7%. Where all products have one sign,
what is cut off adds up: 1.4% and 6.7%, and 0.06% in parts of 128, as scales of blocks have.

sm_80 has no FP8 arithmetic: a code's bits, shifted, are the fp16 number of 2^-8 times its value, subnormals included,
so operands become fp16 in registers, products are exact, and the factor 2^16 is given back at the end. Codes are read
four to a word, and two of them become fp16 at once, in three or four instructions. The codes for NaN (0x7F, 0xFF)
would read as 480 there: a loader refuses weights that hold them.

Roofline: as ``linear_int8``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
    described,
    epilogue,
    put_part,
    sum_parts,
    tile_origin,
)
from ridgeline.backends.cuda.launch import CardShape, Launch, cdiv

KIND = "fp8"
"""Whose peak rate bounds it."""

Scaling = Literal["tensor", "row", "block"]

BLOCK = 128
"""Rows of w and values of K that share a block's scale, and the step along K of tiles that scale blocks."""

PART = 1024
"""Most values of K that the tensor core adds up without scales of blocks; a multiple of every tile's step."""

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, BLOCK, num_warps=2, num_stages=4, per_sm=4),
        Tile(64, 64, 128, BLOCK, num_warps=4, num_stages=3, per_sm=2),
        Tile(MANY, 128, 64, BLOCK, num_warps=8, num_stages=4, per_sm=1),
    ),
    "sm_90": (
        Tile(16, 16, 128, BLOCK, num_warps=4, num_stages=4, per_sm=3, swap=True),
        Tile(64, 64, 128, BLOCK, num_warps=4, num_stages=2, per_sm=2),
        Tile(MANY, 128, 128, BLOCK, num_warps=4, num_stages=5, per_sm=1, specialize=True),
    ),
}
"""Configurations by architecture, by rows, for scales of blocks."""

WHOLE: dict[str, tuple[Tile, ...]] = {
    "sm_80": (*CONFIGS["sm_80"][:2], Tile(MANY, 128, 128, BLOCK, num_warps=8, num_stages=3, per_sm=1)),
    "sm_90": (
        CONFIGS["sm_90"][0],
        Tile(64, 64, 128, 256, num_warps=4, num_stages=2, per_sm=2),
        Tile(MANY, 128, 128, 256, num_warps=4, num_stages=2, per_sm=1, specialize=True),
    ),
}
"""For the others, whose steps may be as long as shared memory allows: the sum's order is the same."""


@triton.jit
def _operand(codes, DECODE: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """What the tensor core takes: e4m3 as it is, or as fp16 of 2^-8 times its value, from its bits: [ROWS, BLOCK_K].

    CODES: how many lie in one element of ``codes``, 1 or 4. Of four, two are decoded at once.
    """
    if CODES == 4:
        odd = (codes & -0x7FFF8000) | ((codes >> 1) & 0x3F803F80)
        even = codes << 8
        even = (even & -0x7FFF8000) | ((even >> 1) & 0x3F803F80)
        first = tl.join(_half(even), _half(odd))
        second = tl.join(_half(even >> 16), _half(odd >> 16))
        return tl.reshape(tl.permute(tl.join(first, second), [0, 1, 3, 2]), [ROWS, BLOCK_K])
    elif DECODE:
        bits = codes.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    else:
        return codes


@triton.jit
def _half(words):
    """fp16 from the low half of int32."""
    return words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _sum(
    x,
    w,
    x_scale,
    w_scale,
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
    SWAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    DECODE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCKED: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: the sum over the steps first .. last - 1 of K, in order, from zero."""
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not TMA:
        WIDTH: tl.constexpr = BLOCK_K // CODES
        x_at = addresses(x, row, M, stride_x, BLOCK_M, WIDTH)
        w_at = addresses(w, column, N, stride_w, BLOCK_N, WIDTH)
    if BLOCKED:
        groups = tl.cdiv(K, BLOCK_K)
        x_scale_at = x_scale + ((row + tl.arange(0, BLOCK_M)) % M).to(tl.int64) * groups
        w_scale_at = w_scale + (column // 128) * groups  # a tile lies within one block: BLOCK_N divides 128
    for step in tl.range(first, last, warp_specialize=SPECIALIZE):
        k = step * BLOCK_K
        if TMA:
            a, b = x.load([row, k]), w.load([column, k])
        elif EVEN_K:
            a, b = tl.load(x_at + step * WIDTH), tl.load(w_at + step * WIDTH)
        else:
            inside = (step * WIDTH + tl.arange(0, WIDTH) < K // CODES)[None, :]
            a = tl.load(x_at + step * WIDTH, mask=inside, other=0.0)
            b = tl.load(w_at + step * WIDTH, mask=inside, other=0.0)
        a, b = _operand(a, DECODE, CODES, BLOCK_M, BLOCK_K), _operand(b, DECODE, CODES, BLOCK_N, BLOCK_K)
        if BLOCKED:
            product = tl.dot(b, a.T) if SWAP else tl.dot(a, b.T)
            scale = tl.load(x_scale_at + step) * tl.load(w_scale_at + step)
            acc += product * (scale[None, :] if SWAP else scale[:, None])
        else:
            acc = tl.dot(b, a.T, acc) if SWAP else tl.dot(a, b.T, acc)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _group(
    y, x, w, x_scale, w_scale, row, column, first, steps, M, N, K, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, DECODE: tl.constexpr, CODES: tl.constexpr, BLOCKED: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """y, which is zero, plus the parts of one of SPLIT groups of K from step ``first`` on, in order."""
    if BLOCKED or DECODE:  # sums of 128 values, or in fp32 throughout: a group has no parts
        return _sum(
            x, w, x_scale, w_scale, row, column, first, min(first + tl.cdiv(steps, SPLIT), steps),
            M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES,
            BLOCKED,
        )  # fmt: skip
    else:
        LENGTH: tl.constexpr = PART // BLOCK_K
        if PARTS == 1:
            return _sum(
                x, w, x_scale, w_scale, row, column, first, min(first + LENGTH, steps),
                M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES,
                BLOCKED,
            )  # fmt: skip
        else:
            for part in range(PARTS):
                start = first + part * LENGTH
                y += _sum(
                    x, w, x_scale, w_scale, row, column, start, min(start + LENGTH, steps),
                    M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE,
                    CODES, BLOCKED,
                )  # fmt: skip
            return y


@triton.jit(do_not_specialize=["M"])
def linear_fp8_kernel(
    x,
    w,
    out,
    x_scale,
    w_scale,
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
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARALLEL: tl.constexpr,
    SWAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    DECODE: tl.constexpr,
    CODES: tl.constexpr,
    SCALING: tl.constexpr,
    SILU_MUL: tl.constexpr,
    workspace=None,
    counters=None,
    bias=None,
    residual=None,
    stride_residual=0,
):
    """out = epilogue(x @ w.T, scaled), persistent: each program takes every num_programs-th job.

    x [M, K] and w [N, K]: descriptors (TMA) or pointers, e4m3, or its bytes (DECODE), CODES of them in an element.
    x_scale, w_scale: [1] and [1] fp32, [M] and [N], or [M, K / 128] and [N / 128, K / 128], sizes rounded up.
    workspace: [SPLIT, M, N] fp32; counters: one int32 for each tile, zero.
    """
    BLOCKED: tl.constexpr = SCALING == "block"
    if SPECIALIZE:
        x, w = described(x, M, K, stride_x, BLOCK_M, BLOCK_K), described(w, N, K, stride_w, BLOCK_N, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    length = tl.cdiv(steps, SPLIT) if BLOCKED or DECODE else PARTS * PART // BLOCK_K
    jobs = tiles * SPLIT if PARALLEL else tiles
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        tile = job // SPLIT if PARALLEL else job
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        done = True
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PARALLEL:
            part = job % SPLIT
            y = _group(
                y, x, w, x_scale, w_scale, row, column, part * length, steps, M, N, K, stride_x, stride_w,
                BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED, SPLIT, PARTS, PART,
            )  # fmt: skip
            put_part(y, workspace, part, row, column, M, N, BLOCK_M, BLOCK_N)
            done = arrive(counters, tile, SPLIT)
        elif SPLIT == 1:
            y = _group(
                y, x, w, x_scale, w_scale, row, column, 0, steps, M, N, K, stride_x, stride_w,
                BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED, SPLIT, PARTS, PART,
            )  # fmt: skip
        else:
            for one in range(SPLIT):
                y += _group(
                    tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                    x, w, x_scale, w_scale, row, column, one * length, steps, M, N, K, stride_x, stride_w,
                    BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED, SPLIT, PARTS,
                    PART,
                )  # fmt: skip
        if done:
            if PARALLEL:
                y = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            if DECODE:
                y *= 65536.0  # a power of two: exact
            if SCALING == "tensor":
                y = y * tl.load(x_scale) * tl.load(w_scale)
            elif SCALING == "row":
                rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
                y = y * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
                y = y * tl.load(w_scale + columns, mask=columns < N, other=0.0)[None, :]
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def split_of(n: int, k: int, scaling: Scaling, arch: str) -> tuple[int, int]:
    """Groups along K of a product with an [n, k] weight, and the parts of PART values in each."""
    if scaling == "block" or arch == "sm_80":
        return gemm.split_k(n, k, BLOCK, least=512), 1
    parts = cdiv(k, PART)
    each = cdiv(parts, gemm.split_k(n, k, PART, least=PART))
    return cdiv(parts, each), each


def linear_fp8_scratch(m: int, n: int, k: int, scaling: Scaling, arch: str) -> Scratch:
    """Scratch that ``linear_fp8`` needs for [m, k] by [n, k]."""
    return gemm.scratch(m, n, split_of(n, k, scaling, arch)[0])


def scale_shapes(m: int, n: int, k: int, scaling: Scaling) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the scales of x and of w."""
    if scaling == "tensor":
        return (1,), (1,)
    if scaling == "row":
        return (m,), (n,)
    return (m, cdiv(k, BLOCK)), (cdiv(n, BLOCK), cdiv(k, BLOCK))


def linear_fp8(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out: torch.Tensor,
    arch: str,
    *,
    scaling: Scaling = "tensor",
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ w.T, scaled).

    Args:
        x: [M, K] float8_e4m3fn; w: [N, K] float8_e4m3fn; the last dimension of each is contiguous.
        x_scale, w_scale: fp32, of ``scale_shapes``; those of w in the merged row order, for silu_mul.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        after: what follows the scaled sum.
        workspace, counters: as ``linear_fp8_scratch`` says.
        batch_invariant: False lets many rows go without the split over K.
    """
    (m, k), n = x.shape, w.shape[0]
    after = after or Epilogue()
    gemm.check(x, w, out, after)
    x_shape, w_shape = scale_shapes(m, n, k, scaling)
    gemm.check_scales(x_scale, x_shape, w_scale, w_shape)
    decode = arch == "sm_80"
    # Words of four codes, 16 of them at once; torch takes words only from where one begins.
    wide = decode and all(size % 64 == 0 for size in (k, x.stride(0), w.stride(0)))
    wide = wide and all(t.storage_offset() % 16 == 0 for t in (x, w))
    if decode:
        x, w = (t.view(torch.int32 if wide else torch.uint8) for t in (x, w))
    regular = gemm.regular(x, w, k, arch)
    tile = gemm.pick((CONFIGS if scaling == "block" else WHOLE)[arch], m, regular, out)
    if decode and not wide:  # a code at a time takes more registers
        tile = replace(tile, block_n=64)
    tma, whole = regular and arch == "sm_90", not batch_invariant and m > gemm.MOST_SPLIT_ROWS
    split, parts = split_of(MANY if whole else n, k, scaling, arch)  # with columns enough there is no split
    args = gemm.operands(x, w, tile, tma)
    args |= {"x_scale": x_scale, "w_scale": w_scale, **after.args()}
    meta: dict[str, Any] = {
        "PART": PART,
        "PARTS": parts,
        "TMA": tma,
        "EVEN_K": k % tile.block_k == 0,
        "SILU_MUL": after.silu_mul,
    }
    meta |= {"DECODE": decode, "CODES": 4 if wide else 1, "SCALING": scaling}
    return [Product(linear_fp8_kernel, arch, m, n, k, tile, split).launch(args, out, workspace, counters, **meta)]


def card_shapes(arch: str) -> list[CardShape]:
    """The projections of an 8B Llama layer with scales per block, and two of them with scales per row."""
    blocks = gemm.llama_shapes(partial(_card_launches, "block"), arch, 1.0 + 4 / BLOCK**2, 1.0 + 4 / BLOCK)
    rows = gemm.llama_shapes(partial(_card_launches, "row"), arch, 1.0, 1.0)
    names = ("qkv", "down")  # in four groups of a part, and of several
    return blocks + [replace(s, name=f"{s.name} by rows") for s in rows if s.name.startswith(names)]


def _card_launches(
    scaling: Scaling, m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str
) -> list[Launch]:
    x, w = (torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="meta") for rows in (m, n))
    x_scale, w_scale = (torch.empty(shape, device="meta") for shape in scale_shapes(m, n, k, scaling))
    workspace, counters = linear_fp8_scratch(m, n, k, scaling, arch).tensors("meta")
    scratch: dict[str, Any] = {"workspace": workspace, "counters": counters}
    return linear_fp8(x, w, x_scale, w_scale, out, arch, scaling=scaling, after=after, **scratch)
