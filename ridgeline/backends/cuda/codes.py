"""Quantized weights as the GPU keeps them: how codes and scales lie in memory, and how a kernel makes numbers of them.

K is counted in steps of PARTS * H values, of which a row has bits * H * PARTS / 8 bytes. H, at most the group, is
``half_of``; PARTS is 4, 16, 8 or 2 for 4, 5, 6 or 8 bits: the fewest codes that fill whole words of 16 bits.
A step is PARTS parts of H codes of one group, side by side as in x, and in memory it is tiles of H words, low byte
first:
- of 5 and 6 bits, first a tile of what is above a code's low four: word j holds it of code j of each part, part 0 in
  the lowest bits. A part gets its own by one shift and one mask, from words that lie where its low four lie;
- a tile for each four parts of low four bits: word j holds code j of the first of them in its lowest four bits;
- of 8 bits, one tile for both parts: word j holds code j of the first in its low byte.
So codes are uint8 [N, bits * H * PARTS / 8 * steps]. Codes past K are zero. Words are as wide as the bf16 made of
their codes: both then lie alike in registers, and x is read in the widest way (of bytes the compiler lays out both for
the bytes, which costs four loads of x for one and moves besides).
- scales: words of 32 bits, int32 [words, N]; columns lie side by side, as a tile reads them. A group's scale is fp16.
  With it in a word is what is added to a code or to its product, fp16 too, by ``Offset``:
  "middle": (code - 2^(bits - 1)) * scale (Q4_0, Q8_0, Q6_K, whose signed codes are shifted by the middle);
  "minimum": code * scale + minimum (Q4_1, Q5_1);
  "zero": (code - zero) * scale (AWQ and GPTQ, whose zeros are integers);
  "codebook": book[code] * scale, of 4 bits through 16 signed bytes (IQ4_NL).
  The scale is the low half, a minimum or a zero the high one. Without these a word holds the scales of two groups, the
  earlier in the low half, or, where a group is no shorter than a step, one and nothing. All zero past K. So a word is
  what an asynchronous copy takes at least, and scales wait in shared memory with their codes.
``pack`` makes it from plain codes; weights/awq.py and weights/gptq.py make those from what such files hold. Columns
that GPTQ sorted by group (its order of activations) are met by x's own: ``gather.gather_columns`` goes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.launch import cdiv

Offset = Literal["middle", "minimum", "zero", "codebook"]

STORED: tuple[Offset, ...] = ("minimum", "zero")
"""Those of which every group has its own."""

GROUPS = (16, 32, 64, 128)

BITS = (4, 5, 6, 8)

WORD = 16
"""Bits of a word of codes."""


def half_of(group: int, bits: int = 4) -> int:
    """H: codes of one group that lie side by side. Of 5 and 6 bits at most 16: a step is 256 and 128 long then."""
    return min(group, 16 if bits in (5, 6) else 32)


def parts_of(bits: int) -> int:
    """PARTS: the fewest codes that fill whole words."""
    return WORD // gcd(WORD, bits)


def step_of(group: int, bits: int) -> int:
    """Values of K in one step."""
    return parts_of(bits) * half_of(group, bits)


def packed_shapes(
    n: int, k: int, group: int, bits: int = 4, offset: Offset = "middle"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes' bytes and of the scales' words of an [n, k] weight."""
    values = cdiv(k, step_of(group, bits)) * step_of(group, bits)
    # A group may be wider than a step: whole groups are kept.
    return (n, values * bits // 8), (cdiv(cdiv(values, group), _scales_in_word(group, bits, offset)), n)


def _scales_in_word(group: int, bits: int, offset: Offset) -> int:
    return 1 if offset in STORED or group >= step_of(group, bits) else 2


def pack(codes: torch.Tensor, group: int, bits: int = 4) -> torch.Tensor:
    """Codes [N, K], uint8 below 2^bits, in this file's layout."""
    (n, k), half, parts = codes.shape, half_of(group, bits), parts_of(bits)
    width = packed_shapes(n, k, group, bits)[0][1]
    places = torch.nn.functional.pad(codes, (0, width * 8 // bits - k)).reshape(n, -1, parts, half).unbind(2)
    words = torch.zeros(n, len(places[0][0]), bits * parts // WORD, half, dtype=torch.int16, device=codes.device)
    held, above = (2, 0) if bits == 8 else (4, int(bits > 4))
    for part, place in enumerate(places):
        found = place.short()
        words[:, :, above + part // held] |= (found if bits == 8 else found & 15) << part % held * (WORD // held)
        if above:
            words[:, :, 0] |= found >> 4 << part * (bits - 4)
    return words.reshape(n, -1).view(torch.uint8)


def pack_scales(
    scales: torch.Tensor, offsets: torch.Tensor | None, k: int, group: int, bits: int = 4, offset: Offset = "middle"
) -> torch.Tensor:
    """Scales and what ``offset`` adds, both fp16 [N, ceil(K / group)], in this file's layout.

    Raises:
        ValueError: other shapes or types, or offsets that ``offset`` does not take or lacks.
    """
    if (offsets is None) == (offset in STORED):
        raise ValueError(f"offset {offset!r} with{'out' if offsets is None else ''} offsets")
    for name, halves in (("scales", scales), ("offsets", scales if offsets is None else offsets)):
        wanted = (scales.shape[0], cdiv(k, group))
        if halves.dtype != torch.float16 or tuple(halves.shape) != wanted:
            raise ValueError(f"{name} are {halves.dtype} {tuple(halves.shape)}, wanted float16 {wanted}")
    each = _scales_in_word(group, bits, offset)
    words, n = packed_shapes(scales.shape[0], k, group, bits, offset)[1]

    def turned(halves: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(halves, (0, words * each - halves.shape[1])).T.contiguous().view(torch.int16)

    low = turned(scales).reshape(words, each, n)
    high = low[:, 1] if each == 2 else torch.zeros_like(low[:, 0]) if offsets is None else turned(offsets)
    return (low[:, 0].int() & 0xFFFF) | high.int() << 16


def book_of(codebook: Sequence[int] | None) -> dict[str, int]:
    """A codebook as kernels take it: two words of 64 bits, each entry a byte, 128 added."""
    entries = bytes(value + 128 for value in codebook or ())
    words = [int.from_bytes(entries[at : at + 8], "little", signed=True) for at in (0, 8)]
    return {"BOOK_LOW": words[0], "BOOK_HIGH": words[1]}


def check_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    k: int,
    group: int,
    bits: int,
    offset: Offset,
    codebook: Sequence[int] | None,
) -> None:
    """Raises ValueError for tensors that are not an [N, k] weight in this file's layout."""
    if group not in GROUPS or bits not in BITS:
        raise ValueError(f"codes of {bits} bits in groups of {group}: this kernel has {BITS} in {GROUPS}")
    if (codebook is None) != (offset != "codebook"):
        raise ValueError(f"offset {offset!r} with{'out' if codebook is None else ''} a codebook")
    if codebook is not None and (bits != 4 or len(codebook) != 16 or not all(-128 <= v <= 127 for v in codebook)):
        raise ValueError(f"a codebook of {bits} bits is {list(codebook)}, wanted of 4 bits and 16 signed bytes")
    shapes = packed_shapes(codes.shape[0], k, group, bits, offset)
    for name, tensor, shape in zip(("codes", "scales"), (codes, scales), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} are {tuple(tensor.shape)}, wanted {shape}")
    if codes.dtype != torch.uint8 or codes.stride(1) != 1:
        raise ValueError(f"codes are {codes.dtype}, wanted uint8, rows contiguous")
    if codes.stride(0) % 2 or codes.storage_offset() % 2:
        raise ValueError(f"rows of codes are words of 16 bits, not {codes.stride(0)} bytes apart")
    if scales.dtype != torch.int32 or not scales.is_contiguous():
        raise ValueError(f"scales are {scales.dtype}, wanted contiguous words of int32")


@triton.jit
def weights_of(
    fields,
    scale,
    offset,
    AT: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK_LOW: tl.constexpr,
    BOOK_HIGH: tl.constexpr,
):
    """fp32 weights from [BLOCK_N, H] int32 with a code in the bits from AT on, 12 or 16, and [BLOCK_N] scales, offsets.

    A code in those bits of the float BASE = 2^(23 - AT) is BASE + code: no shift, and no conversion, which runs at a
    quarter rate. BASE + code, or + zero, times a scale has at most 23 bits: one multiply-add takes BASE away exactly.
    """
    scale = scale.to(tl.float32)[:, None]
    BASE: tl.constexpr = float(1 << (23 - AT))
    # BASE, but the compiler cannot know it: one instruction masks and sets bits, but holds one constant, not two.
    base = (scale * 0.0 + BASE).to(tl.int32, bitcast=True)
    if OFFSET == "codebook":
        # Eight entries are a word of 64 bits, which one shift by eight times the code brings down.
        code = fields >> AT
        book = tl.where(code >= 8, tl.full([1, 1], BOOK_HIGH, tl.int64), tl.full([1, 1], BOOK_LOW, tl.int64))
        fields = ((book >> ((code << 3) & 56)).to(tl.int32) & 255) << AT
    value = (fields | base).to(tl.float32, bitcast=True)
    if OFFSET == "codebook":
        return value * scale - scale * (BASE + 128)
    elif OFFSET == "middle":
        return value * scale - scale * (BASE + (1 << (BITS - 1)))
    elif OFFSET == "zero":
        return value * scale - scale * (BASE + offset.to(tl.float32)[:, None])
    else:
        return (value - BASE) * scale + offset.to(tl.float32)[:, None]


@triton.jit
def fields_of(codes, above, part: tl.constexpr, AT: tl.constexpr, BITS: tl.constexpr):
    """The codes of one part, int32, in the bits from AT on: from its words, and those of what is above the low four."""
    codes = codes.to(tl.int32)
    if BITS == 8:
        fields = (codes << (AT - 8 * part)) & (255 << AT)
    else:
        fields = (codes << (AT - 4 * (part % 4))) & (15 << AT)
    if BITS == 5 or BITS == 6:
        MASK: tl.constexpr = ((1 << (BITS - 4)) - 1) << (AT + 4)
        fields |= (above.to(tl.int32) << (AT + 4 - part * (BITS - 4))) & MASK
    return fields


@triton.jit
def scale_of(
    scales, columns, N, step, part: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """fp16 [columns]: the scales of the group of a part of a step, and what OFFSET adds."""
    STEP: tl.constexpr = PARTS * HALF
    EACH: tl.constexpr = 1 if OFFSET == "minimum" or OFFSET == "zero" or WIDTH >= STEP else 2
    if WIDTH >= STEP:
        word = step * STEP // WIDTH
    else:
        word = step * (STEP // WIDTH // EACH) + part * HALF // WIDTH // EACH
    SHIFT: tl.constexpr = 16 * (part * HALF // WIDTH % EACH)
    pair = tl.load(scales + word.to(tl.int64) * N + columns)
    low, high = (pair >> SHIFT).to(tl.int16), (pair >> 16).to(tl.int16)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
