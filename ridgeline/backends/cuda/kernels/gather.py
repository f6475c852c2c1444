"""Rows by index: the embedding of token ids, and the rows of a step that are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.codes import (
    Offset,
    book_of,
    check_codes,
    half_of,
    parts_of,
    weights_of,
)
from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

CONFIGS: dict[str, Config] = {
    "sm_80": Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
    "sm_90": Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
}


@triton.jit
def gather_kernel(table, index, out, table_stride, out_stride, N: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a row."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + r).to(tl.int64)
    v = tl.load(table + row * table_stride + c, mask=c < N)
    tl.store(out + r * out_stride + c, v.to(out.dtype.element_ty), mask=c < N)


def gather(table: torch.Tensor, index: torch.Tensor, out: torch.Tensor, *, arch: str = "sm_90") -> list[Launch]:
    """out[r] = table[index[r]]: table [rows, N], index int32 [R] within it, out [R, N] of the same or a wider type."""
    rows, columns = out.shape
    config = CONFIGS[arch]
    args = {
        "table": table,
        "index": index,
        "out": out,
        "table_stride": table.stride(0),
        "out_stride": out.stride(0),
    }
    meta = {**config.meta, "N": columns}
    grid = (rows, cdiv(columns, config.meta["BLOCK"]))
    return [Launch(gather_kernel, grid, args, Config(meta, config.num_warps, config.num_stages), ("out",))]


@triton.jit
def gather_columns_kernel(x, index, out, x_stride, out_stride, N: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a row, from wherever they are."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(index + c, mask=c < N)
    v = tl.load(x + r * x_stride + column, mask=c < N)
    tl.store(out + r * out_stride + c, v, mask=c < N)


def gather_columns(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor, *, arch: str = "sm_90") -> list[Launch]:
    """out[:, c] = x[:, index[c]]: the order that GPTQ's sorted columns meet x in.

    x [M, K], index int32 [K] within it, out [M, K] of x's type. A launch before the product: what it moves is the
    activations, once there and once back, and the product's copies stay 16 bytes wide.
    """
    if out.shape != x.shape or tuple(index.shape) != (x.shape[1],) or out.dtype != x.dtype:
        raise ValueError(
            f"columns {tuple(index.shape)} of {x.dtype} {tuple(x.shape)} into {out.dtype} {tuple(out.shape)}"
        )
    (rows, columns), config = out.shape, CONFIGS[arch]
    args = {"x": x, "index": index, "out": out, "x_stride": x.stride(0), "out_stride": out.stride(0)}
    meta = {**config.meta, "N": columns}
    grid = (rows, cdiv(columns, config.meta["BLOCK"]))
    return [Launch(gather_columns_kernel, grid, args, Config(meta, config.num_warps, config.num_stages), ("out",))]


@triton.jit
def gather_quantized_kernel(
    codes, scales, index, out, code_stride, out_stride,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, PARTS: tl.constexpr, OFFSET: tl.constexpr, BOOK_LOW: tl.constexpr, BOOK_HIGH: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row of codes (``codes.py``), as numbers."""
    HELD: tl.constexpr = 2 if BITS == 8 else 4
    ABOVE: tl.constexpr = 1 if BITS == 5 or BITS == 6 else 0
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < N
    row = tl.load(index + r).to(tl.int64)
    part, word = c // HALF % PARTS, c // (PARTS * HALF) * (PARTS * BITS // 16 * HALF) + c % HALF
    at = codes + row * code_stride + word
    code = tl.load(at + (ABOVE + part // HELD) * HALF, mask=live).to(tl.int32) >> (part % HELD * (16 // HELD))
    code &= (1 << (16 // HELD)) - 1
    if ABOVE:
        above = tl.load(at, mask=live).to(tl.int32) >> (part * (BITS - 4))
        code |= (above & ((1 << (BITS - 4)) - 1)) << 4
    group, EACH = c // WIDTH, 1 if OFFSET == "minimum" or OFFSET == "zero" or WIDTH >= PARTS * HALF else 2
    pair = tl.load(scales + (group // EACH).to(tl.int64) * ROWS + row, mask=live)
    scale = (pair >> (16 * (group % EACH))).to(tl.int16).to(tl.float16, bitcast=True)
    offset = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    v = weights_of((code << 12)[:, None], scale, offset, 12, BITS, OFFSET, BOOK_LOW, BOOK_HIGH)
    tl.store(out + r * out_stride + c, tl.sum(v, axis=1).to(out.dtype.element_ty), mask=live)


def gather_quantized(
    codes: torch.Tensor,
    scales: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    bits: int,
    offset: Offset,
    codebook: Sequence[int] | None = None,
    arch: str = "sm_90",
) -> list[Launch]:
    """out[r] = weights[index[r]] of a weight as ``codes.py`` has it: out [R, K] of a float type."""
    check_codes(codes, scales, out.shape[1], group, bits, offset, codebook)
    config = CONFIGS[arch]
    args = {
        "codes": codes.view(torch.int16),
        "scales": scales,
        "index": index,
        "out": out,
        "code_stride": codes.stride(0) // 2,
        "out_stride": out.stride(0),
    }
    sizes = {"N": out.shape[1], "ROWS": codes.shape[0], "HALF": half_of(group, bits), "WIDTH": group}
    meta = {**config.meta, **sizes, "BITS": bits, "PARTS": parts_of(bits), "OFFSET": offset, **book_of(codebook)}
    grid = (out.shape[0], cdiv(out.shape[1], config.meta["BLOCK"]))
    return [Launch(gather_quantized_kernel, grid, args, Config(meta, config.num_warps, config.num_stages), ("out",))]


def library(launches: list[Launch]) -> Callable[[], Any]:
    """PyTorch's embedding on a launch's tensors."""
    args = launches[0].args
    return lambda: torch.nn.functional.embedding(args["index"], args["table"])


def card_shapes(arch: str) -> list[CardShape]:
    """The embedding of an 8B Llama."""
    shapes = []
    table = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    for rows in (1, 64, 4096):
        index = torch.empty(rows, dtype=torch.int32, device="meta")
        out = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        shapes.append(CardShape(f"M={rows}", gather(table, index, out, arch=arch), 0.0, 4.0 * rows * 4096 + 4 * rows))
    return shapes
