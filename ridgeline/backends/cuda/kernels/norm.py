"""RMSNorm and LayerNorm, with the residual added first and the result quantized in the same pass if wanted.

RMSNorm: Zhang and Sennrich, 2019; LayerNorm: Ba et al., 2016. A row is read once, kept in registers in fp32, and
reduced in one fixed order, whatever rows lie beside it. Short rows (a head's q/k norm) share a program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda import e4m3
from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv, next_power_of_2

MOST_COLUMNS = 16384
"""A row must fit the registers of a program."""

CONFIGS: dict[int, tuple[int, int]] = {
    64: (16, 4),
    128: (8, 4),
    256: (4, 4),
    512: (2, 4),
    1024: (1, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 8),
    16384: (1, 16),
}
"""Columns, padded to a power of two -> rows of a program, warps. The same for both architectures: memory decides."""

NONE, INT8, FP8, FP8_CODES = 0, 1, 2, 3
"""What a row becomes. FP8_CODES: FP8, encoded here, where the architecture has no such conversion."""


@triton.jit
def norm_kernel(
    x,
    delta,
    weight,
    bias,
    total,
    out,
    scales,
    x_stride,
    delta_stride,
    total_stride,
    out_stride,
    rows,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """ROWS rows of N columns, each in BLOCK lanes."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    live = (r < rows) & (c < N)
    v = tl.load(x + r * x_stride + c, mask=live, other=0.0).to(tl.float32)
    if HAS_DELTA:
        v += tl.load(delta + r * delta_stride + c, mask=live, other=0.0).to(tl.float32)
        tl.store(total + r * total_stride + c, v.to(total.dtype.element_ty), mask=live)
    if CENTER:
        mean = tl.sum(v, axis=1, keep_dims=True) / N
        v = tl.where(c < N, v - mean, 0.0)
    variance = tl.sum(v * v, axis=1, keep_dims=True) / N
    w = tl.load(weight + c, mask=c < N).to(tl.float32)
    y = v * (1.0 / tl.sqrt(variance + eps)) * w
    if HAS_BIAS:
        y += tl.load(bias + c, mask=c < N).to(tl.float32)
    at = out + r * out_stride + c
    if QUANTIZE == 0:
        tl.store(at, y.to(out.dtype.element_ty), mask=live)
    else:
        most: tl.constexpr = 127.0 if QUANTIZE == 1 else 448.0
        largest = tl.max(tl.where(live, tl.abs(y), 0.0), axis=1)
        codes = y * tl.where(largest > 0.0, most / largest, 0.0)[:, None]
        if QUANTIZE == 1:
            codes = (codes + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest even integer
        if QUANTIZE == 3:
            codes = e4m3.encode(codes)
        tl.store(at, codes.to(out.dtype.element_ty), mask=live)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(scales + row, largest / most, mask=row < rows)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    delta: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    center: bool = False,
    arch: str = "sm_90",
) -> list[Launch]:
    """out = norm(x [+ delta]) * weight [+ bias]; ``center``: LayerNorm, else RMSNorm.

    Args:
        x: [rows, N] bf16, fp16 or fp32; rows may be padded.
        weight, bias: [N].
        out: [rows, N]: a float type, or int8 or float8_e4m3fn with ``scales`` [rows] fp32: amax / 127 or amax / 448.
        delta, total: [rows, N]: the residual to add, and where the sum goes.

    Raises:
        ValueError: rows too wide for a program, or delta without total.
    """
    rows, columns = x.shape
    block = max(64, next_power_of_2(columns))
    if block > MOST_COLUMNS:
        raise ValueError(f"norm: {columns} columns, at most {MOST_COLUMNS}")
    if (delta is None) != (total is None):
        raise ValueError("norm: delta and total come together")
    per_program, warps = CONFIGS[block]
    quantize = {torch.int8: INT8, torch.float8_e4m3fn: FP8}.get(out.dtype, NONE)
    if quantize == FP8 and arch == "sm_80":
        quantize, out = FP8_CODES, out.view(torch.uint8)
    meta = {
        "N": columns,
        "BLOCK": block,
        "ROWS": per_program,
        "HAS_DELTA": delta is not None,
        "CENTER": center,
        "HAS_BIAS": bias is not None,
        "QUANTIZE": quantize,
    }
    args = {
        "x": x,
        "delta": x if delta is None else delta,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "total": out if total is None else total,
        "out": out,
        "scales": out if scales is None else scales,
        "x_stride": x.stride(0),
        "delta_stride": 0 if delta is None else delta.stride(0),
        "total_stride": 0 if total is None else total.stride(0),
        "out_stride": out.stride(0),
        "rows": rows,
        "eps": eps,
    }
    writes = ["out"] + (["total"] if total is not None else []) + (["scales"] if quantize else [])
    return [Launch(norm_kernel, (cdiv(rows, per_program),), args, Config(meta, warps, 1), tuple(writes))]


def library(launches: list[Launch]) -> Callable[[], Any] | None:
    """PyTorch's add and RMSNorm on a launch's tensors; None where it has no such operation."""
    args, meta = launches[0].args, launches[0].config.meta
    if meta["QUANTIZE"] or not meta["HAS_DELTA"]:
        return None

    def task() -> None:
        total = args["x"] + args["delta"]
        torch.nn.functional.rms_norm(total, (meta["N"],), args["weight"], args["eps"])

    return task


def card_shapes(arch: str) -> list[CardShape]:
    """The residual and norm of an 8B Llama, to bf16 and to int8."""
    shapes = []
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.int8, "int8")):
        for rows in (1, 64, 4096):
            x, delta, total, out = (
                torch.empty(rows, 4096, dtype=t, device="meta")
                for t in (torch.bfloat16, torch.bfloat16, torch.bfloat16, dtype)
            )
            weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
            scales = torch.empty(rows, dtype=torch.float32, device="meta") if dtype == torch.int8 else None
            launches = norm(x, weight, out, eps=1e-5, delta=delta, total=total, scales=scales, arch=arch)
            moved: Any = rows * 4096 * (6 + out.element_size()) + 2 * 4096
            shapes.append(CardShape(f"{label} M={rows}", launches, 5.0 * rows * 4096, moved))
    return shapes
