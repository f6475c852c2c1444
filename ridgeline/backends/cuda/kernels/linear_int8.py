"""y = (x @ w.T) * scales of int8 codes: W8A8, one scale for each row of x and one for each row of w.

Codes are multiplied and added in int32, exactly (IMMA on sm_80, IGMMA on sm_90), and scaled once:
``float(sum) * x_scale * w_scale``. Integer sums do not depend on their order, so a row's bits depend on nothing but
the row and the weights, whatever the tiles and the split. |sum| stays below 2^31 for K up to 133,144 (127^2 each).

Roofline: half of ``linear``'s bytes for each operand, and twice its rate on the tensor cores.
"""

from __future__ import annotations

from dataclasses import replace

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
    accumulate,
    arrive,
    described,
    epilogue,
    put_part,
    sum_parts,
    tile_origin,
)
from ridgeline.backends.cuda.launch import CardShape, Launch, cdiv

KIND = "int8"
"""Whose peak rate bounds it."""

BLOCK_K = 128
"""Values of K in a step: 128 bytes, the widest swizzle of shared memory."""

FEW_ROWS, FEW_K = 16, 256
"""The same of up to 16 rows on sm_90, where the loop's own instructions weigh most; integer sums are exact in any
order, so a row's bits do not hang on it. The split over K is counted in these, the longest steps there are."""

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, BLOCK_K, num_warps=4, num_stages=5, per_sm=3),
        Tile(64, 64, 128, BLOCK_K, num_warps=4, num_stages=4, per_sm=2),
        Tile(1024, 128, 128, BLOCK_K, num_warps=8, num_stages=3, per_sm=1),  # twice as many programs
        Tile(MANY, 128, 256, 64, num_warps=8, num_stages=4, per_sm=1),
    ),
    "sm_90": (
        Tile(16, 16, 64, FEW_K, num_warps=4, num_stages=3, per_sm=3, swap=True),
        Tile(64, 64, 128, BLOCK_K, num_warps=4, num_stages=3, per_sm=2),
        Tile(MANY, 128, 256, BLOCK_K, num_warps=4, num_stages=3, per_sm=1, specialize=True),
    ),
}
"""Configurations by architecture, by rows."""


@triton.jit(do_not_specialize=["M"])
def linear_int8_kernel(
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
    """out = epilogue((x @ w.T) * x_scale * w_scale), persistent: each program takes every num_programs-th job.

    x [M, K] and w [N, K] int8: descriptors (TMA) or pointers; x_scale [M], w_scale [N] fp32.
    workspace: [SPLIT, M, N] int32; counters: one int32 for each tile, zero.
    """
    if SPECIALIZE:
        x, w = described(x, M, K, stride_x, BLOCK_M, BLOCK_K), described(w, N, K, stride_w, BLOCK_N, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    parts = SPLIT if PARALLEL else 1
    length = tl.cdiv(steps, parts)
    for job in range(tl.program_id(0), tiles * parts, tl.num_programs(0)):
        tile, part = job // parts, job % parts
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        first = part * length
        total = accumulate(
            x, w, row, column, first, min(first + length, steps), M, N, K, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, tl.int32,
        )  # fmt: skip
        done = True
        if PARALLEL:
            put_part(total, workspace, part, row, column, M, N, BLOCK_M, BLOCK_N)
            done = arrive(counters, tile, SPLIT)
        if done:
            if PARALLEL:
                total = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
            y = total.to(tl.float32) * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
            y *= tl.load(w_scale + columns, mask=columns < N, other=0.0)[None, :]
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def split_of(n: int, k: int) -> int:
    """Parts along K of a few-row product with an [n, k] weight."""
    return gemm.split_k(n, k, FEW_K, least=512)


def _parts(m: int, n: int, k: int, tile: Tile, arch: str) -> int:
    """Parts along K of a product of ``m`` rows: as many as keep the memory busy, for each is written and read again.

    Sums of integers are exact, so that, unlike in other products, M may decide.
    """
    parts, most = 1, split_of(n, k)
    if m <= FEW_ROWS:
        return most
    programs, steps = cdiv(m, tile.block_m) * cdiv(n, tile.block_n), cdiv(k, tile.block_k)
    while parts < most and programs * parts < 0.6 * gemm.SMS[arch]:
        parts = min(2 * parts, most)
    return cdiv(steps, cdiv(steps, parts))


def linear_int8_scratch(m: int, n: int, k: int) -> Scratch:
    """Scratch that ``linear_int8`` needs for [m, k] by [n, k]."""
    return gemm.scratch(m, n, split_of(n, k))


def linear_int8(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out: torch.Tensor,
    arch: str,
    *,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> list[Launch]:
    """out = epilogue((x @ w.T) * x_scale * w_scale).

    Args:
        x: [M, K] int8; w: [N, K] int8; the last dimension of each is contiguous.
        x_scale: [M] fp32; w_scale: [N] fp32 (in the merged row order, for silu_mul).
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        after: what follows the scaled sum.
        workspace, counters: as ``linear_int8_scratch`` says.
    """
    (m, k), n = x.shape, w.shape[0]
    after = after or Epilogue()
    gemm.check(x, w, out, after)
    gemm.check_scales(x_scale, (m,), w_scale, (n,))
    regular = gemm.regular(x, w, k, arch)
    tile, tma = gemm.pick(CONFIGS[arch], m, regular, out), regular and arch == "sm_90"
    if not regular:
        tile = replace(tile, block_k=BLOCK_K)
    args = gemm.operands(x, w, tile, tma)
    args |= {"x_scale": x_scale, "w_scale": w_scale, **after.args()}
    meta = {"TMA": tma, "EVEN_K": k % tile.block_k == 0, "SILU_MUL": after.silu_mul}
    product = Product(linear_int8_kernel, arch, m, n, k, tile, _parts(m, n, k, tile, arch), torch.int32)
    return [product.launch(args, out, workspace, counters, **meta)]


def card_shapes(arch: str) -> list[CardShape]:
    """The projections of an 8B Llama layer, with what is fused into each."""
    return gemm.llama_shapes(_card_launches, arch, weight_bytes=1.0, input_bytes=1.0)


def _card_launches(m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str) -> list[Launch]:
    x, w = (torch.empty(rows, k, dtype=torch.int8, device="meta") for rows in (m, n))
    x_scale, w_scale = (torch.empty(rows, device="meta") for rows in (m, n))
    workspace, counters = linear_int8_scratch(m, n, k).tensors("meta")
    return linear_int8(x, w, x_scale, w_scale, out, arch, after=after, workspace=workspace, counters=counters)
