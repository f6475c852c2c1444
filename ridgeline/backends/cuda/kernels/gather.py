"""Rows by index: the embedding of token ids, and the rows of a step that are sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

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
