"""SiLU(gate) * up and GELU(gate) * up (Shazeer, 2020, "GLU Variants Improve Transformer"): one read, one write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

CONFIGS: dict[str, Config] = {
    "sm_80": Config({"BLOCK": 2048}, num_warps=4, num_stages=1),
    "sm_90": Config({"BLOCK": 2048}, num_warps=4, num_stages=1),
}
"""Sixteen bf16 values a thread, in loads of 16 bytes: the rows' addresses are worked out once for two of them."""

FEW, FEW_CONFIG = 8, Config({"BLOCK": 512}, num_warps=2, num_stages=1)
"""So few rows would leave most of the device idle: more and smaller programs."""

FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def gated_kernel(
    gate, up, out, gate_stride, up_stride, out_stride, N: tl.constexpr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK columns of a row."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < N
    g = tl.load(gate + r * gate_stride + c, mask=live).to(tl.float32)
    u = tl.load(up + r * up_stride + c, mask=live).to(tl.float32)
    if FUNCTION == 0:
        a = g / (1.0 + tl.exp2(g * -1.4426950408889634))  # exp(-g), the sign in the factor
    elif FUNCTION == 1:
        a = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:  # 0.5 g (1 + tanh z) = g sigmoid(2 z)
        z = -2.302208198144325 * (g + 0.044715 * g * g * g)  # -2 sqrt(2 / pi) log2(e)
        a = g / (1.0 + tl.exp2(z))
    tl.store(out + r * out_stride + c, (a * u).to(out.dtype.element_ty), mask=live)


def gated(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, function: str = "silu", arch: str = "sm_90"
) -> list[Launch]:
    """out = function(gate) * up, all [rows, N] of float types; gate and up may be halves of one tensor.

    Raises:
        ValueError: an unknown function.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"gated: {function!r}, expected one of {', '.join(FUNCTIONS)}")
    rows, columns = out.shape
    config = FEW_CONFIG if rows <= FEW else CONFIGS[arch]
    meta = {**config.meta, "N": columns, "FUNCTION": FUNCTIONS[function]}
    args = {
        "gate": gate,
        "up": up,
        "out": out,
        "gate_stride": gate.stride(0),
        "up_stride": up.stride(0),
        "out_stride": out.stride(0),
    }
    grid = (rows, cdiv(columns, config.meta["BLOCK"]))
    return [Launch(gated_kernel, grid, args, Config(meta, config.num_warps, config.num_stages), ("out",))]


def library(launches: list[Launch]) -> Callable[[], Any]:
    """PyTorch's SiLU and product on a launch's tensors."""
    args = launches[0].args
    return lambda: torch.nn.functional.silu(args["gate"]).mul_(args["up"])


def card_shapes(arch: str) -> list[CardShape]:
    """The MLP of an 8B Llama."""
    shapes = []
    for rows in (1, 64, 4096):
        gate, up, out = (torch.empty(rows, 14336, dtype=torch.bfloat16, device="meta") for _ in range(3))
        shapes.append(CardShape(f"M={rows}", gated(gate, up, out, arch=arch), 6.0 * rows * 14336, 6.0 * rows * 14336))
    return shapes
