"""y = x @ w.T of codes: W4A16 and W8A16, one fp16 scale for each group of 32, 64 or 128 along K, x in bf16 or fp16.

**Layout.** With H = min(group, 64) and PARTS = 8 / bits codes in a byte, K is counted in steps of PARTS * H:
- codes: uint8 [N, H * steps]. Byte j of a step holds the step's code j (in its low half), and of 4 bits code H + j in
  its high half, so that a row's low or high halves are H codes of one group that lie side by side, as in x. Codes past
  K are zero.
- scales: fp16 [groups, N], groups = PARTS * H * steps / group; columns lie side by side, as a tile reads them. Zero
  past K.
- what is added to a code or to its product, by ``Offset``, fp16 [groups, N] too:
  "middle": (code - 2^(bits - 1)) * scale (Q4_0, Q8_0, whose signed codes are shifted by 128);
  "minimum": code * scale + minimum (Q4_1);
  "zero": (code - zero) * scale (AWQ and GPTQ, whose zeros are integers).
``pack`` makes it from plain codes; weights/awq.py and weights/gptq.py make those from what such files hold.

Weights are computed in fp32 in registers, where each of these is exact but for one rounding to x's dtype, and are the
tensor core's first operand for any number of rows (on sm_90 wgmma takes that one from registers).

Roofline: a quarter, or half, of ``linear``'s weight bytes and its rate on the tensor cores; a code costs about four
other instructions before it gets there.
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
    epilogue,
    put_part,
    sum_parts,
    tile_origin,
)
from ridgeline.backends.cuda.launch import CardShape, Launch, cdiv

Offset = Literal["middle", "minimum", "zero"]

GROUPS = (32, 64, 128)

BITS = (4, 8)

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, 64, num_warps=8, num_stages=5, per_sm=2, swap=True),
        Tile(64, 64, 64, 64, num_warps=4, num_stages=4, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=2, per_sm=1, swap=True),
    ),
    "sm_90": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=6, per_sm=3, swap=True),
        Tile(64, 64, 128, 64, num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=2, per_sm=1, swap=True),
    ),
}
"""Configurations by architecture, by rows; block_k is H, half a step of K."""


@triton.jit
def weights_of(codes, scale, offset, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """fp32 weights from [BLOCK_N, H] codes, int32, and [BLOCK_N] scales and offsets."""
    # A code in the last bits of 2^23 is 2^23 + code: one bitwise or, and no conversion, which runs at a quarter rate.
    value = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    scale = scale.to(tl.float32)[:, None]
    if OFFSET == "middle":
        return (value - (8388616.0 if BITS == 4 else 8388736.0)) * scale
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
    BITS: tl.constexpr,
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
        for part in tl.static_range(8 // BITS):
            k = (8 // BITS * step + part) * HALF
            if TMA:
                a = x.load([row, k])
            elif EVEN_K:
                a = tl.load(x_at + k)
            else:
                a = tl.load(x_at + k, mask=(k + tl.arange(0, HALF) < K)[None, :], other=0.0)
            group = (k // WIDTH).to(tl.int64) * N
            scale = tl.load(scales + group + columns)
            offset = scale
            if OFFSET != "middle":
                offset = tl.load(offsets + group + columns)
            these = codes
            if BITS == 4:
                these = codes >> 4 if part else codes & 15
            acc = tl.dot(weights_of(these.to(tl.int32), scale, offset, BITS, OFFSET).to(a.dtype), a.T, acc)
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
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
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
    steps = tl.cdiv(K, 8 // BITS * BLOCK_K)
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
            BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, BITS, OFFSET, TMA, EVEN_K,
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
                    BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, BITS, OFFSET, TMA, EVEN_K,
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


def step_of(group: int, bits: int) -> int:
    """Values of K in one step."""
    return 8 // bits * half_of(group)


def packed_shapes(n: int, k: int, group: int, bits: int = 4) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes' bytes and of the scales of an [n, k] weight."""
    steps = cdiv(k, step_of(group, bits))
    # A group may be wider than a step: whole groups are kept.
    return (n, half_of(group) * steps), (cdiv(step_of(group, bits) * steps, group), n)


def pack(codes: torch.Tensor, scales: torch.Tensor, group: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (or offsets) in this file's layout.

    Args:
        codes: [N, K] uint8 below 2^bits; scales: [N, ceil(K / group)].
    """
    (n, k), half = codes.shape, half_of(group)
    (_, width), (groups, _) = packed_shapes(n, k, group, bits)
    parts = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, parts * width - k)).reshape(n, -1, parts, half)
    packed = padded[:, :, 0] if bits == 8 else padded[:, :, 0] | padded[:, :, 1] << 4
    turned = torch.nn.functional.pad(scales, (0, groups - scales.shape[1])).T.contiguous()
    return packed.reshape(n, width).contiguous(), turned


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
    offsets: torch.Tensor | None = None,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ weights.T).

    Args:
        x: [M, K] bf16 or fp16, rows contiguous.
        codes, scales, offsets: as the module says; offsets unless ``offset`` is "middle". Rows of a weight for
            silu_mul are in the merged order.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        group: values of K that share a scale; bits: of a code.
        after: what follows the sum.
        workspace, counters: as ``linear_quantized_scratch`` says.
        batch_invariant: False lets many rows go without the split over K.
    """
    (m, k), n = x.shape, codes.shape[0]
    after = after or Epilogue()
    _check(x, codes, scales, offsets, out, group, bits, offset, after)
    half = half_of(group)
    regular = gemm.regular(x, codes, k, arch)
    tile, tma = _tile(arch, m, half, regular, out), regular and arch == "sm_90"
    split = split_of(n, k, group, bits) if batch_invariant or m <= gemm.MOST_SPLIT_ROWS else 1
    args = gemm.operands(x, codes, tile, tma)
    args |= {"scales": scales, **({"offsets": offsets} if offsets is not None else {}), **after.args()}
    meta: dict[str, Any] = {"WIDTH": group, "BITS": bits, "OFFSET": offset, "TMA": tma}
    meta["EVEN_K"] = k % step_of(group, bits) == 0
    product = Product(linear_quantized_kernel, arch, m, n, k, tile, split)
    return [product.launch(args, out, workspace, counters, SILU_MUL=after.silu_mul, **meta)]


def _tile(arch: str, m: int, half: int, regular: bool, out: torch.Tensor) -> Tile:
    tile = replace(gemm.pick(CONFIGS[arch], m, regular, out), block_k=half)
    return tile if regular else replace(tile, num_warps=4)


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    out: torch.Tensor,
    group: int,
    bits: int,
    offset: Offset,
    after: Epilogue,
) -> None:
    """Raises ValueError for operands that do not make a product."""
    (m, k), n = x.shape, codes.shape[0]
    if group not in GROUPS or bits not in BITS:
        raise ValueError(f"codes of {bits} bits in groups of {group}: this kernel has {BITS} in {GROUPS}")
    if (offsets is None) != (offset == "middle"):
        raise ValueError(f"offset {offset!r} with{'out' if offsets is None else ''} offsets")
    codes_shape, scales_shape = packed_shapes(n, k, group, bits)
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
    """The projections of an 8B Llama layer: 4 bits with zeros per group of 128 (AWQ), and Q8_0's of 32."""
    found = gemm.llama_shapes(partial(_card_launches, 4), arch, weight_bytes=0.5 + 4 / 128, input_bytes=2.0)
    wide = gemm.llama_shapes(partial(_card_launches, 8), arch, weight_bytes=1 + 2 / 32, input_bytes=2.0)
    return [replace(shape, name=f"{bits} bits {shape.name}") for bits, of in ((4, found), (8, wide)) for shape in of]


def _card_launches(bits: int, m: int, n: int, k: int, after: Epilogue, out: torch.Tensor, arch: str) -> list[Launch]:
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    group = 128 if bits == 4 else 32
    shapes = packed_shapes(n, k, group, bits)
    codes = torch.empty(shapes[0], dtype=torch.uint8, device="meta")
    scales, zeros = (torch.empty(shapes[1], dtype=torch.float16, device="meta") for _ in range(2))
    workspace, counters = linear_quantized_scratch(m, n, k, group, bits).tensors("meta")
    how: dict[str, Any] = {"workspace": workspace, "counters": counters, "group": group, "bits": bits, "after": after}
    if bits == 4:
        how |= {"offset": "zero", "offsets": zeros}
    return linear_quantized(x, codes, scales, out, arch, **how)
