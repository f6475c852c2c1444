"""y = x @ w.T of codes: 4, 5, 6 or 8 bits, one fp16 scale for each group of 16 to 128 along K, x in bf16 or fp16.

**Layout.** K is counted in steps of PARTS * H values, of which a row has bits * H * PARTS / 8 bytes. H, at most the
group, is ``half_of``; PARTS is 2, 8, 4 or 1 for 4, 5, 6 or 8 bits: the fewest codes that fill whole bytes. A step is
PARTS parts of H codes of one group, side by side as in x, and in bytes it is tiles of H:
- of 5 and 6 bits, first a tile of what is above a code's low four: byte j holds it of code j of each part, part 0 in
  the lowest bits. A part gets its own by one shift and one mask, from bytes that lie where its low four lie;
- a tile for two parts of low four bits: byte j holds code j of the one in its low half, of the other in its high half;
- of 8 bits, one tile of codes as they are.
So codes are uint8 [N, bits * H * PARTS / 8 * steps]. Codes past K are zero.
- scales: fp16 [groups, N], groups = PARTS * H * steps / group; columns lie side by side, as a tile reads them. Zero
  past K.
- what is added to a code or to its product, by ``Offset``, fp16 [groups, N] too:
  "middle": (code - 2^(bits - 1)) * scale (Q4_0, Q8_0, Q6_K, whose signed codes are shifted by the middle);
  "minimum": code * scale + minimum (Q4_1, Q5_1);
  "zero": (code - zero) * scale (AWQ and GPTQ, whose zeros are integers);
  "codebook": book[code] * scale, of 4 bits through 16 signed bytes (IQ4_NL); nothing is stored.
``pack`` makes it from plain codes; weights/awq.py and weights/gptq.py make those from what such files hold. Columns
that GPTQ sorted by group (its order of activations) are met by x's own: ``gather.gather_columns`` goes before.

Weights are computed in fp32 in registers, where each of these is exact but for one rounding to x's dtype, and are the
tensor core's first operand for any number of rows (on sm_90 wgmma takes that one from registers).

Roofline: a quarter to half of ``linear``'s weight bytes and its rate on the tensor cores; a code costs about four other
instructions before it gets there, two more of 5 and 6 bits, seven or eight more through a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
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

Offset = Literal["middle", "minimum", "zero", "codebook"]

GROUPS = (16, 32, 64, 128)

BITS = (4, 5, 6, 8)

CONFIGS: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=5, per_sm=3, swap=True),
        Tile(64, 64, 64, 64, num_warps=4, num_stages=4, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=2, per_sm=1, swap=True),
    ),
    "sm_90": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=6, per_sm=3, swap=True),
        Tile(64, 64, 128, 64, num_warps=4, num_stages=3, per_sm=2, swap=True),
        Tile(MANY, 128, 128, 64, num_warps=8, num_stages=2, per_sm=1, swap=True),
    ),
}
"""Configurations by architecture, by rows; block_k is H, a part of a step of K."""

CONFIGS_OF_5 = {
    "sm_80": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=4, per_sm=2, swap=True),
        Tile(64, 64, 64, 64, num_warps=8, num_stages=3, per_sm=1, swap=True),
        CONFIGS["sm_80"][2],
    ),
    "sm_90": (
        Tile(16, 16, 64, 64, num_warps=4, num_stages=4, per_sm=3, swap=True),
        Tile(64, 64, 128, 64, num_warps=4, num_stages=2, per_sm=2, swap=True),
        CONFIGS["sm_90"][2],
    ),
}
"""Of 5 bits: a step, and so a stage, is twice as long."""


@triton.jit
def weights_of(
    codes, scale, offset, BITS: tl.constexpr, OFFSET: tl.constexpr, BOOK_LOW: tl.constexpr, BOOK_HIGH: tl.constexpr
):
    """fp32 weights from [BLOCK_N, H] codes, int32, and [BLOCK_N] scales and offsets."""
    scale = scale.to(tl.float32)[:, None]
    if OFFSET == "codebook":
        # Eight entries are a word of 64 bits, which one shift by eight times the code brings down.
        book = tl.where(codes >= 8, tl.full([1, 1], BOOK_HIGH, tl.int64), tl.full([1, 1], BOOK_LOW, tl.int64))
        codes = (book >> ((codes << 3) & 56)).to(tl.int32) & 255
    # A code in the last bits of 2^23 is 2^23 + code: one bitwise or, and no conversion, which runs at a quarter rate.
    value = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    if OFFSET == "codebook":
        return (value - 8388736.0) * scale
    elif OFFSET == "middle":
        return (value - (8388608.0 + (1 << (BITS - 1)))) * scale
    elif OFFSET == "zero":
        return (value - (8388608.0 + offset.to(tl.float32)[:, None])) * scale
    else:
        return (value - 8388608.0) * scale + offset.to(tl.float32)[:, None]


@triton.jit
def _part(codes, above, part: tl.constexpr, BITS: tl.constexpr):
    """The codes of one part, int32, from its tile and the tile of what is above their low four bits."""
    found = codes.to(tl.int32)
    if BITS < 8:
        found = found >> 4 if part % 2 else found & 15
    if BITS == 5 or BITS == 6:
        MASK: tl.constexpr = ((1 << (BITS - 4)) - 1) << 4
        SHIFT: tl.constexpr = 4 - part * (BITS - 4)
        more = above.to(tl.int32)
        found |= (more << SHIFT if SHIFT > 0 else more >> -SHIFT) & MASK
    return found


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
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: the sum over the steps first .. last - 1 of K, in order, from zero."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    columns = (column + tl.arange(0, BLOCK_N)) % N
    if not TMA:
        x_at = addresses(x, row, M, stride_x, BLOCK_M, HALF)
        w_at = addresses(w, column, N, stride_w, BLOCK_N, HALF)
    TILES: tl.constexpr = PARTS * BITS // 8
    ABOVE: tl.constexpr = 1 if BITS == 5 or BITS == 6 else 0
    for step in range(first, last):
        byte = step * (TILES * HALF)
        above = None
        if ABOVE:
            above = w.load([column, byte]) if TMA else tl.load(w_at + byte)
        for part in tl.static_range(PARTS):
            if part % 2 == 0:
                at = byte + (ABOVE + part // 2) * HALF
                codes = w.load([column, at]) if TMA else tl.load(w_at + at)
            k = (PARTS * step + part) * HALF
            if TMA:
                a = x.load([row, k])
            elif EVEN_K:
                a = tl.load(x_at + k)
            else:
                a = tl.load(x_at + k, mask=(k + tl.arange(0, HALF) < K)[None, :], other=0.0)
            group = (k // WIDTH).to(tl.int64) * N
            scale = tl.load(scales + group + columns)
            offset = scale
            if OFFSET == "minimum" or OFFSET == "zero":
                offset = tl.load(offsets + group + columns)
            these = weights_of(_part(codes, above, part, BITS), scale, offset, BITS, OFFSET, BOOK_LOW, BOOK_HIGH)
            acc = tl.dot(these.to(a.dtype), a.T, acc)
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
    offsets=None,
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
    steps = tl.cdiv(K, PARTS * BLOCK_K)
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
            BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, TMA, EVEN_K,
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
                    BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, TMA, EVEN_K,
                )  # fmt: skip
        if done:
            if PARALLEL:
                y = sum_parts(workspace, row, column, M, N, BLOCK_M, BLOCK_N, SPLIT)
            epilogue(
                y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL
            )  # fmt: skip


def half_of(group: int, bits: int = 4) -> int:
    """H: codes of one group that lie side by side. Of 5 and 6 bits at most 32: a step is 256 and 128 long then."""
    return min(group, 32 if bits in (5, 6) else 64)


def parts_of(bits: int) -> int:
    """PARTS: the fewest codes that fill whole bytes."""
    return 8 // gcd(8, bits)


def step_of(group: int, bits: int) -> int:
    """Values of K in one step."""
    return parts_of(bits) * half_of(group, bits)


def packed_shapes(n: int, k: int, group: int, bits: int = 4) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes' bytes and of the scales of an [n, k] weight."""
    values = cdiv(k, step_of(group, bits)) * step_of(group, bits)
    # A group may be wider than a step: whole groups are kept.
    return (n, values * bits // 8), (cdiv(values, group), n)


def pack(codes: torch.Tensor, scales: torch.Tensor, group: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (or offsets) in this file's layout.

    Args:
        codes: [N, K] uint8 below 2^bits; scales: [N, ceil(K / group)].
    """
    (n, k), half, parts = codes.shape, half_of(group, bits), parts_of(bits)
    (_, width), (groups, _) = packed_shapes(n, k, group, bits)
    tiles = torch.nn.functional.pad(codes, (0, width * 8 // bits - k)).reshape(n, -1, parts, half)
    if bits < 8:
        low, above = tiles & 15, torch.zeros_like(tiles[:, :, :1])
        for part in range(parts):
            above |= tiles[:, :, part : part + 1] >> 4 << part * (bits - 4)
        tiles = low[:, :, 0::2] | low[:, :, 1::2] << 4
        tiles = torch.cat([above, tiles], 2) if bits > 4 else tiles
    turned = torch.nn.functional.pad(scales, (0, groups - scales.shape[1])).T.contiguous()
    return tiles.reshape(n, width).contiguous(), turned


def book_of(codebook: Sequence[int] | None) -> dict[str, int]:
    """A codebook as kernels take it: two words of 64 bits, each entry a byte, 128 added."""
    entries = bytes(value + 128 for value in codebook or ())
    words = [int.from_bytes(entries[at : at + 8], "little", signed=True) for at in (0, 8)]
    return {"BOOK_LOW": words[0], "BOOK_HIGH": words[1]}


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
    codebook: Sequence[int] | None = None,
    after: Epilogue | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = True,
) -> list[Launch]:
    """out = epilogue(x @ weights.T).

    Args:
        x: [M, K] bf16 or fp16, rows contiguous.
        codes, scales, offsets: as the module says; offsets where ``offset`` is "minimum" or "zero". Rows of a weight
            for silu_mul are in the merged order.
        out: [M, N], or [M, N / 2] after silu_mul; bf16, fp16 or fp32, rows contiguous.
        group: values of K that share a scale; bits: of a code.
        codebook: 16 integers from -128 to 127, where ``offset`` is "codebook".
        after: what follows the sum.
        workspace, counters: as ``linear_quantized_scratch`` says.
        batch_invariant: False lets many rows go without the split over K.
    """
    (m, k), n = x.shape, codes.shape[0]
    after = after or Epilogue()
    check_codes(codes, scales, offsets, k, group, bits, offset, codebook)
    gemm.check_shapes(m, n, out, after)
    if any(t.stride(1) != 1 for t in (x, codes, out)):
        raise ValueError("rows must be contiguous")
    regular = gemm.regular(x, codes, k, arch)
    tile, tma = _tile(arch, m, group, bits, regular, out), regular and arch == "sm_90"
    split = split_of(n, k, group, bits) if batch_invariant or m <= gemm.MOST_SPLIT_ROWS else 1
    args = gemm.operands(x, codes, tile, tma)
    args |= {"scales": scales, **({"offsets": offsets} if offsets is not None else {}), **after.args()}
    meta: dict[str, Any] = {"WIDTH": group, "BITS": bits, "PARTS": parts_of(bits), "OFFSET": offset, "TMA": tma}
    meta |= {**book_of(codebook), "EVEN_K": k % step_of(group, bits) == 0}
    product = Product(linear_quantized_kernel, arch, m, n, k, tile, split)
    return [product.launch(args, out, workspace, counters, SILU_MUL=after.silu_mul, **meta)]


def _tile(arch: str, m: int, group: int, bits: int, regular: bool, out: torch.Tensor) -> Tile:
    table = (CONFIGS_OF_5 if bits == 5 else CONFIGS)[arch]
    tile = replace(gemm.pick(table, m, regular, out), block_k=half_of(group, bits))
    return tile if regular else replace(tile, num_warps=4)


def check_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    k: int,
    group: int,
    bits: int,
    offset: Offset,
    codebook: Sequence[int] | None,
) -> None:
    """Raises ValueError for tensors that are not an [N, k] weight in this file's layout."""
    if group not in GROUPS or bits not in BITS:
        raise ValueError(f"codes of {bits} bits in groups of {group}: this kernel has {BITS} in {GROUPS}")
    if (offsets is None) != (offset in ("middle", "codebook")):
        raise ValueError(f"offset {offset!r} with{'out' if offsets is None else ''} offsets")
    if (codebook is None) != (offset != "codebook"):
        raise ValueError(f"offset {offset!r} with{'out' if codebook is None else ''} a codebook")
    if codebook is not None and (bits != 4 or len(codebook) != 16 or not all(-128 <= v <= 127 for v in codebook)):
        raise ValueError(f"a codebook of {bits} bits is {list(codebook)}, wanted of 4 bits and 16 signed bytes")
    codes_shape, scales_shape = packed_shapes(codes.shape[0], k, group, bits)
    for name, tensor, shape in (("codes", codes, codes_shape), ("scales", scales, scales_shape)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} are {tuple(tensor.shape)}, wanted {shape}")
    for found in (scales, offsets):
        if found is not None and (not found.is_contiguous() or tuple(found.shape) != scales_shape):
            raise ValueError(f"scales and offsets are contiguous and {scales_shape}")


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
    shapes = packed_shapes(n, k, form.group, form.bits)
    codes = torch.empty(shapes[0], dtype=torch.uint8, device="meta")
    scales, offsets = (torch.empty(shapes[1], dtype=torch.float16, device="meta") for _ in range(2))
    workspace, counters = linear_quantized_scratch(m, n, k, form.group, form.bits).tensors("meta")
    how: dict[str, Any] = {"group": form.group, "bits": form.bits, "offset": form.offset, "after": after}
    if form.offset in ("minimum", "zero"):
        how["offsets"] = offsets
    elif form.offset == "codebook":
        how["codebook"] = range(-128, 128, 16)
    return linear_quantized(x, codes, scales, out, arch, workspace=workspace, counters=counters, **how)
