"""y = x @ w.T of bf16 or fp16, accumulated in fp32, with what follows it in the same launch.

Roofline of one product: 2 M N K operations; (M K + N K) elements read and M N written. Few rows read every weight
once, so memory decides; from about 300 rows on (an H100's 989 TFLOP/s over 3.35 TB/s, NVIDIA's datasheet) the tensor
cores do. How a row's bits stay the same whatever M is: ``gemm``.
"""

from __future__ import annotations

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
from ridgeline.backends.cuda.launch import CardShape, Launch

BLOCK_K = {"sm_80": 64, "sm_90": 128}
"""Values of K in a step, for every tile of an architecture: what fits thrice in an A100's shared memory, and half the
loop's own instructions on an H100."""

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, BLOCK_K["sm_80"], num_warps=4, num_stages=5, per_sm=3),
        Tile(64, 64, 64, BLOCK_K["sm_80"], num_warps=4, num_stages=4, per_sm=2),
        Tile(MANY, 128, 128, BLOCK_K["sm_80"], num_warps=8, num_stages=3, per_sm=1),
    ),
    "sm_90": (
        Tile(16, 16, 128, BLOCK_K["sm_90"], num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(64, 64, 128, BLOCK_K["sm_90"], num_warps=4, num_stages=2, per_sm=2),
        Tile(MANY, 128, 128, BLOCK_K["sm_90"], num_warps=4, num_stages=2, per_sm=1, specialize=True),
    ),
}
"""Configurations by architecture, by rows."""

WIDE: dict[str, Tile] = {
    "sm_80": Tile(MANY, 128, 256, BLOCK_K["sm_80"], num_warps=8, num_stages=3, per_sm=1),
    "sm_90": Tile(MANY, 128, 256, 64, num_warps=4, num_stages=4, per_sm=1, specialize=True),
}
"""For many rows where K is not split: no second accumulator, so that a tile may be twice as wide. (Steps along K are
its own: there are no parts for them to bound.)"""


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    w,
    out,
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
    """out = epilogue(x @ w.T), persistent: each program takes every num_programs-th job.

    x [M, K] and w [N, K]: descriptors (TMA) or pointers. A job is a tile, or one of its SPLIT parts (PARALLEL).
    workspace: [SPLIT, M, N] fp32; counters: one int32 for each tile, zero.
    """
    if SPECIALIZE:
        x, w = described(x, M, K, stride_x, BLOCK_M, BLOCK_K), described(w, N, K, stride_w, BLOCK_N, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    length = tl.cdiv(steps, SPLIT)
    jobs = tiles * SPLIT if PARALLEL else tiles
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        tile = job // SPLIT if PARALLEL else job
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        done = True
        if PARALLEL:
            part = job % SPLIT
            first = part * length
            y = accumulate(
                x, w, row, column, first, min(first + length, steps), M, N, K, stride_x, stride_w,
                BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K,
            )  # fmt: skip
            put_part(y, workspace, part, row, column, M, N, BLOCK_M, BLOCK_N)
            done = arrive(counters, tile, SPLIT)
        else:
            y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for one in range(SPLIT):
                first = one * length
                y += accumulate(
                    x, w, row, column, first, min(first + length, steps), M, N, K, stride_x, stride_w,
                    BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K,
                )  # fmt: skip
        if done:
            if PARALLEL:
                y = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def split_of(n: int, k: int) -> int:
    """Parts along K of a product with an [n, k] weight."""
    return gemm.split_k(n, k, max(BLOCK_K.values()))


def linear_scratch(m: int, n: int, k: int) -> Scratch:
    """Scratch that ``linear`` needs for [m, k] by [n, k]."""
    return gemm.scratch(m, n, split_of(n, k))


def _tile(arch: str, m: int, split: int, regular: bool, out: torch.Tensor) -> Tile:
    tile = gemm.pick(CONFIGS[arch], m, regular, out, roomy=True)
    return WIDE[arch] if regular and tile.rows == MANY and split == 1 else tile


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    arch: str,
    *,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ w.T).

    Args:
        x: [M, K]; w: [N, K], of one dtype, bf16 or fp16; the last dimension of each is contiguous.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        after: what follows the sum.
        workspace, counters: as ``linear_scratch`` says.
        batch_invariant: False lets many rows go without the split over K, and with the widest tiles.
    """
    (m, k), n = x.shape, w.shape[0]
    after = after or Epilogue()
    gemm.check(x, w, out, after)
    split = split_of(n, k) if batch_invariant or m <= gemm.MOST_SPLIT_ROWS else 1
    regular = gemm.regular(x, w, k, arch)
    tile, tma = _tile(arch, m, split, regular, out), regular and arch == "sm_90"
    args = gemm.operands(x, w, tile, tma)
    meta = {"TMA": tma, "EVEN_K": k % tile.block_k == 0, "SILU_MUL": after.silu_mul}
    product = Product(linear_kernel, arch, m, n, k, tile, split)
    return [product.launch({**args, **after.args()}, out, workspace, counters, **meta)]


def card_shapes(arch: str) -> list[CardShape]:
    """The projections of an 8B Llama layer in bf16, with what is fused into each."""
    return gemm.llama_shapes(_card_launches, arch, weight_bytes=2.0, input_bytes=2.0)


def _card_launches(m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str) -> list[Launch]:
    x, w = (torch.empty(rows, k, dtype=torch.bfloat16, device="meta") for rows in (m, n))
    workspace, counters = linear_scratch(m, n, k).tensors("meta")
    return linear(x, w, out, arch, after=after, workspace=workspace, counters=counters)
