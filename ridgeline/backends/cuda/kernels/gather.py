"""Rows by index: the embedding of token ids, and the rows of a step that are sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.kernels.linear_quantized import Offset, half_of, weights_of
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
def gather_quantized_kernel(
    codes, scales, offsets, index, out, code_stride, out_stride,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row of codes (``linear_quantized``'s layout), as numbers."""
    PARTS: tl.constexpr = 8 // BITS
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < N
    row = tl.load(index + r).to(tl.int64)
    byte = c // (PARTS * HALF) * HALF + c % HALF
    code = tl.load(codes + row * code_stride + byte, mask=live, other=0).to(tl.int32)
    if BITS == 4:
        code = (code >> (4 * (c % (PARTS * HALF) // HALF))) & 15
    group = (c // WIDTH).to(tl.int64) * ROWS + row
    scale = tl.load(scales + group, mask=live, other=0.0)
    offset = scale
    if OFFSET != "middle":
        offset = tl.load(offsets + group, mask=live, other=0.0)
    v = weights_of(code[:, None], scale, offset, BITS, OFFSET)
    tl.store(out + r * out_stride + c, tl.sum(v, axis=1).to(out.dtype.element_ty), mask=live)


def gather_quantized(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    index: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    bits: int,
    offset: Offset,
    arch: str = "sm_90",
) -> list[Launch]:
    """out[r] = weights[index[r]] of a weight in ``linear_quantized``'s layout: out [R, K] of a float type."""
    config = CONFIGS[arch]
    args = {
        "codes": codes,
        "scales": scales,
        "offsets": scales if offsets is None else offsets,
        "index": index,
        "out": out,
        "code_stride": codes.stride(0),
        "out_stride": out.stride(0),
    }
    sizes = {"N": out.shape[1], "ROWS": codes.shape[0], "HALF": half_of(group), "WIDTH": group}
    meta = {**config.meta, **sizes, "BITS": bits, "OFFSET": offset}
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
